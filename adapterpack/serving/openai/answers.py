"""The responses of OpenAI's routes, as structs that define both their JSON and the OpenAPI document.

``system_fingerprint`` is the digest of what answered: the adapter's pack, or the bundle for the base.
``adapterpack`` has the same with names.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from ...io import FrozenStruct


class PromptDetails(FrozenStruct):
    """How many tokens of the prompts were known from earlier requests, and not read again."""

    cached_tokens: int = 0


class Usage(FrozenStruct):
    """The token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()


class PassUsage(FrozenStruct):
    """The token counts of a request that generates none."""

    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, tokens: int) -> PassUsage:
        """Makes the usage of a prompt of so many tokens."""
        return cls(tokens, tokens)


class Share(FrozenStruct):
    """One of several adapters whose changes were added, with its weight."""

    name: str
    digest: str
    weight: float


class Provenance(FrozenStruct):
    """What answered: the adapter's name (null: none) and digest, and the base. Without an adapter ``digest``
    is the bundle's. For several adapters ``adapter`` and ``digest`` join all of them with their weights, and
    ``adapters`` lists them. ``warnings`` are notes on the answer for the client. ``sure`` says how sure the
    choice is, from 0 to 1, if the request left it to the server.
    """

    adapter: str | None
    digest: str
    base: str
    adapters: list[Share] | UnsetType = UNSET
    warnings: list[str] | UnsetType = UNSET
    sure: float | UnsetType = UNSET

    def called(self, name: str) -> str:
        """Returns the name of the model for an answer: the request's ``name``, or what the server chose."""
        return name if self.sure is UNSET else self.adapter or self.base


class TopLogprob(FrozenStruct):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(FrozenStruct):
    """A token of the answer, with the most likely tokens at its position."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class PromptLogprob(FrozenStruct):
    """A token at a place of a prompt, by its id; ``rank`` 1 is the likeliest, null one that is not listed."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt itself and the likeliest in its place, in vLLM's form; the first has none."""


class ChatLogprobs(FrozenStruct):
    """The tokens of a message with their log-probabilities."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(FrozenStruct):
    """The function that a tool call names; ``arguments`` is a JSON text."""

    name: str
    arguments: str


class ToolCall(FrozenStruct):
    """A call of a tool."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class FunctionDelta(FrozenStruct):
    """A piece of a call in a stream: first its name, then its arguments piece by piece."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(FrozenStruct):
    """A piece of call number ``index`` in a stream; the first piece has the call's id."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class AnswerMessage(FrozenStruct):
    """The message that answers a conversation. It has no text if it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(FrozenStruct):
    """One of the answers to a request."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class Delta(FrozenStruct):
    """A piece of a message in a stream."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(FrozenStruct):
    """A piece of one of the answers in a stream."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(FrozenStruct, kw_only=True):
    """The response of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    adapterpack: Provenance
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatChunk(FrozenStruct, kw_only=True):
    """An event of a stream of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str
    adapterpack: Provenance | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(FrozenStruct):
    """The tokens of a text, their offsets in it, and the most likely tokens at each position. The first token
    of an echoed prompt has neither.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(FrozenStruct):
    """One of the answers, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(FrozenStruct, kw_only=True):
    """The response of ``/v1/completions``, or an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str
    adapterpack: Provenance | UnsetType = UNSET


class ModelCard(FrozenStruct, kw_only=True):
    """A model that requests may name. ``root`` is its digest; ``parent`` is the base of an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["adapterpack"] = "adapterpack"
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(FrozenStruct):
    """All models that a key may name."""

    data: list[ModelCard]
    object: Literal["list"] = "list"
