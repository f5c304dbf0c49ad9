"""The requests of OpenAI's routes, as this server takes them: the structs that parse a body, and that its
OpenAPI document shows.

A field that is ``null`` is as if it were not there. One that is not listed here is an error, as it might
change what the client expects; those of :class:`Sampled` that are listed without an effect cannot change an
answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from ...http.http_error import HTTPError
from ...io.typed_json import Misfit, StrictStruct
from ...runtime.adapters.mix import LARGEST, MOST
from ..tenants.limits import ServerLimits
from .tools import FunctionTool, InputCall, ToolChoice


class StreamOptions(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """What a stream has besides its chunks: the count of tokens at the end, or in each chunk so far."""

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: bool | None = None


class PlainText(StrictStruct, frozen=True, tag="text", tag_field="type", forbid_unknown_fields=True):
    """An answer of any form."""


class JsonObject(StrictStruct, frozen=True, tag="json_object", tag_field="type", forbid_unknown_fields=True):
    """An answer that is a JSON object."""


class Schema(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """A JSON schema; it is always kept, whatever ``strict`` says."""

    name: str
    schema_: dict[str, Any] = field(name="schema", default_factory=dict)
    strict: bool | None = None
    description: str | None = None


class JsonSchema(StrictStruct, frozen=True, tag="json_schema", tag_field="type", forbid_unknown_fields=True):
    """An answer that fits a JSON schema."""

    json_schema: Schema


class Structured(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """An answer of a given form, as vLLM has it: one of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class NamedWeight(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """An adapter of several whose changes are added, each times its weight."""

    name: str
    weight: Annotated[float, Meta(ge=-LARGEST, le=LARGEST)] = 1.0


Mixed = Annotated[list[NamedWeight], Meta(min_length=1, max_length=MOST)]
"""The adapters of a request, for the base as its model."""


CacheSalt = Annotated[str, Meta(min_length=1, max_length=1024)]
"""Prompts with another one share nothing that was read of them."""


class Sampled(StrictStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What requests of text have in common. Ranges are those of
    :class:`adapterpack.runtime.generation.sampling.Sampling`; what is left out is what the server's
    ``--sampling`` says.
    """

    model: str
    adapters: Mixed | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: PlainText | JsonObject | JsonSchema | None = None
    structured_outputs: Structured | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    cache_salt: CacheSalt | None = None
    # without an effect:
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer, if the request says it."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likely tokens are listed in the place of each, None for no log-probabilities."""
        raise NotImplementedError

    def parameters(self, limits: ServerLimits) -> dict[str, Any]:
        """The sampling parameters that it gives, by their names here.

        Raises:
            HTTPError: they are more or larger than a request's may be, or contradict each other.
        """
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "seed": self.seed,
            "stop": _stop(self.stop, limits),
            "stop_token_ids": self.stop_token_ids,
            "min_new_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "logprobs": self.wanted_logprobs,
        }
        forms = list(self._forms())
        if len(forms) > 1:
            raise HTTPError(
                400,
                "invalid_request",
                f"an answer has one form, and the request gives {len(forms)}",
                param=forms[1][0],
            )
        for param, name, form in forms:
            text = form if isinstance(form, str) else json.dumps(form)
            if len(text) > limits.form_characters:
                raise HTTPError(
                    400,
                    "invalid_request",
                    f"the form of an answer may have {limits.form_characters} characters",
                    param=param,
                )
            given[name] = form
        return {name: value for name, value in given.items() if value is not None}

    def _forms(self) -> Iterator[tuple[str, str, Any]]:
        """Field, sampling parameter and value of each form that the answer is to have."""
        match self.response_format:
            case JsonObject():
                yield "response_format", "json_schema", {"type": "object"}
            case JsonSchema(json_schema=schema):
                yield "response_format", "json_schema", schema.schema_
        given = self.structured_outputs or Structured()
        if given.json_object:
            yield "structured_outputs", "json_schema", {"type": "object"}
        for source, name, value in (
            ("structured_outputs", "json_schema", given.json),
            ("structured_outputs", "regex", given.regex),
            ("structured_outputs", "grammar", given.grammar),
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_grammar", "grammar", self.guided_grammar),
        ):
            if value is not None:
                yield source, name, value
        for source, choices in (("structured_outputs", given.choice), ("guided_choice", self.guided_choice)):
            if choices is not None:
                yield source, "grammar", f"start: {' | '.join(map(json.dumps, choices))}"


ONLY_TEXTS = {"otherwise": "this server reads texts: run --image and Session answer about pictures"}
"""For the kinds of content that a message may have."""


class TextPart(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """A piece of text of a message."""

    type: Annotated[Literal["text"], Meta(extra=ONLY_TEXTS)]
    text: str


class Message(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation. What the assistant said may come back as it was answered, with the
    fields that are null there.
    """

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[InputCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Calls with arguments that are none."""
        for place, call in enumerate(self.tool_calls or ()):
            yield from (Misfit(f"/tool_calls/{place}{pointer}", what) for pointer, what in call.breaches())

    def render(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content or ())
        )
        calls = [call.for_template() for call in self.tool_calls] if self.tool_calls else None
        named = {"name": self.name, "tool_call_id": self.tool_call_id, "tool_calls": calls}
        return {
            "role": self.role,
            "content": content,
            **{key: value for key, value in named.items() if value is not None},
        }


def breaches_of(messages: Sequence[Message]) -> Iterator[Misfit]:
    """What types cannot say of the messages in a field of that name."""
    for number, message in enumerate(messages):
        yield from (Misfit(f"/messages/{number}{pointer}", what) for pointer, what in message.breaches())


class ChatRequest(Sampled, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Messages that are none; two numbers of tokens; the likeliest tokens without log-probabilities."""
        yield from breaches_of(self.messages)
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            yield Misfit(
                "/max_completion_tokens",
                "max_tokens is the former name of max_completion_tokens: give one of them",
            )
        if self.top_logprobs is not None and not self.logprobs:
            yield Misfit("/top_logprobs", "top_logprobs goes with logprobs: true")

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them. What a tool said has the name of the tool that was
        called.
        """
        names = {
            call.id: call.function.name for message in self.messages for call in message.tool_calls or ()
        }
        return [
            {
                **({"name": name} if (name := names.get(message.tool_call_id or "")) else {}),
                **message.render(),
            }
            for message in self.messages
        ]

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer; without them it may go on to the end of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to list beside each one; None for no log-probabilities."""
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(Sampled, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/completions``. A prompt is a text or token ids, or several of one kind; a text is taken as
    it is.
    """

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Prompts of several kinds; log-probabilities of a prompt."""
        yield from one_kind("prompt", self.prompt)
        if self.echo and self.logprobs is not None:
            yield Misfit(
                "/echo", "the log-probabilities of a prompt are not known here: leave out echo or logprobs"
            )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one an answer (or ``n``)."""
        return as_list(self.prompt)

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer; 16, as OpenAI has it, if the request does not say it."""
        return self.max_tokens or 16

    @property
    def wanted_logprobs(self) -> int | None:
        """The field itself, which is a number on this route."""
        return self.logprobs


def one_kind(field_name: str, given: Any) -> Iterator[Misfit]:
    """A field with values of several kinds."""
    if isinstance(given, list) and len({type(item) for item in given}) > 1:
        yield Misfit(f"/{field_name}", "these are all texts, or all lists of token ids")


def as_list(given: Any) -> list[Any]:
    """The values of a field that takes one or several; a list of numbers is one.

    Example:
        >>> as_list("a"), as_list([1, 2]), as_list([[1], [2]])
        (['a'], [[1, 2]], [[1], [2]])
    """
    return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


def _stop(stop: str | list[str] | None, limits: ServerLimits) -> tuple[str, ...] | None:
    if stop is None:
        return None
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > limits.stop or any(len(text) > limits.stop_characters for text in texts):
        raise HTTPError(
            400,
            "invalid_request",
            f"a request may have {limits.stop} stop texts of {limits.stop_characters} characters",
            param="stop",
        )
    return texts
