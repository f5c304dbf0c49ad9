"""The answers of OpenAI's routes: the structs that become their JSON, and that the OpenAPI document shows.

``system_fingerprint`` is the digest of what answered: that of the adapter's pack, or of the bundle for the
base. ``adapterpack`` says the same with names.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class Usage(msgspec.Struct, frozen=True):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PassUsage(msgspec.Struct, frozen=True):
    """Counts of tokens where nothing but inputs has some."""

    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, tokens: int) -> PassUsage:
        """Of so many tokens."""
        return cls(tokens, tokens)


class Share(msgspec.Struct, frozen=True):
    """One of several adapters whose changes were added, and its weight."""

    name: str
    digest: str
    weight: float


class Provenance(msgspec.Struct, frozen=True):
    """What answered: the adapter's name (null: none) and digest, and the base. ``digest`` is the bundle's
    where there is no adapter. Of several ``adapter`` and ``digest`` have all of them with their weights, as
    ``adapters`` lists them. ``warnings`` say what the client should know of the answer.
    """

    adapter: str | None
    digest: str
    base: str
    adapters: list[Share] | UnsetType = UNSET
    warnings: list[str] | UnsetType = UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token of the answer, with the likeliest in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """The tokens of a message."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """What is called; ``arguments`` is JSON."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a tool."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class FunctionDelta(msgspec.Struct, frozen=True):
    """What a chunk adds to a call: first its name, then its arguments piece by piece."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True):
    """What a chunk adds to call number ``index``; the first one has its id."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class AnswerMessage(msgspec.Struct, frozen=True):
    """The message that answers a conversation; without text where it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    adapterpack: Provenance


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a stream of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str
    adapterpack: Provenance | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """The tokens of a text, where each begins in it, and the likeliest in its place."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One of the answers, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``/v1/completions``, or an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str
    adapterpack: Provenance | UnsetType = UNSET


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a request may name. ``root`` is its digest, ``parent`` the base of an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["adapterpack"] = "adapterpack"
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(msgspec.Struct, frozen=True):
    """All models that a key may name."""

    data: list[ModelCard]
    object: Literal["list"] = "list"
