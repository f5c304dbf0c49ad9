"""The requests of OpenAI's routes, as structs that parse a body and define the OpenAPI document.

``null`` in a field means that it is absent. Unknown fields are errors, since they might change what the
client expects. Fields of :class:`Sampled` that are accepted without an effect cannot change an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from ...http import invalid_request
from ...io import ClosedStruct, Json, Misfit, PositiveWhole, Whole, breaches_inside, without_none
from ...runtime.adapters import LARGEST, MOST
from ...runtime.media import DATA
from ..tenants import ServerLimits
from .tools import FunctionTool, InputCall, ToolChoice

_SAME = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)
"""The fields that :class:`.Sampling` has under the same names."""


class StreamOptions(ClosedStruct):
    """Options of a stream: whether its last chunk has the token counts, or every chunk those so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class PlainText(ClosedStruct, tag="text", tag_field="type"):
    """An answer without constraints."""


class JsonObject(ClosedStruct, tag="json_object", tag_field="type"):
    """An answer that is a JSON object."""


class Schema(ClosedStruct):
    """A JSON schema. It is always enforced, whatever ``strict`` says."""

    name: str
    schema_: Json = field(name="schema", default_factory=dict)
    strict: bool | None = None
    description: str | None = None


class JsonSchema(ClosedStruct, tag="json_schema", tag_field="type"):
    """An answer that matches a JSON schema."""

    json_schema: Schema


class Structured(ClosedStruct):
    """A constrained answer in the form of vLLM's API: one of these fields."""

    json: Json | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class NamedWeight(ClosedStruct):
    """One of several adapters whose changes are added, with its weight."""

    name: str
    weight: Annotated[float, Meta(ge=-LARGEST, le=LARGEST)] = 1.0


Mixed = Annotated[list[NamedWeight], Meta(min_length=1, max_length=MOST)]
"""The adapters of a request whose model is the base."""


CacheSalt = Annotated[str, Meta(min_length=1, max_length=1024)]
"""Prompts share cached prefixes only if their salts are equal."""


Priority = Annotated[int, Meta(ge=-1000, le=1000)]
"""Among the rows of one key the smaller priority goes first."""


class ClientRequest(ClosedStruct, kw_only=True):
    """A request of which fields that only other servers know are left out with a note."""


class TextRequest(ClientRequest, kw_only=True):
    """The fields of every request for text."""

    model: str
    adapters: Mixed | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stream: bool | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None
    # without an effect:
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Sampled(TextRequest, kw_only=True):
    """The common fields of chat and completion requests. Ranges are those of
    :class:`adapterpack.runtime.generation.sampling.Sampling`; the server's ``--sampling`` decides what
    missing fields mean.
    """

    max_tokens: PositiveWhole | None = None
    n: PositiveWhole | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: PlainText | JsonObject | JsonSchema | None = None
    structured_outputs: Structured | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    return_token_ids: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits for what a stream cannot give."""
        whole = {"prompt_logprobs": self.prompt_logprobs is not None, "use_beam_search": self.use_beam_search}
        for name, wanted in whole.items():
            if self.stream and wanted:
                yield Misfit(f"/{name}", "a stream does not give this: leave out stream")

    @property
    def drawn(self) -> int:
        """The number of answers to each prompt that are made."""
        return self.n or 1

    @property
    def wanted_scores(self) -> int | None:
        """The number of likely tokens to list at each position of a prompt, or None for no
        log-probabilities.
        """
        return self.prompt_logprobs

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer, or None if the request does not say."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """The number of likely tokens to list at each position, or None for no log-probabilities."""
        raise NotImplementedError

    def parameters(self, limits: ServerLimits) -> Json:
        """Returns the sampling parameters of the request, by the names of :class:`.Sampling`.

        Raises:
            HTTPError: parameters exceed a limit, or contradict each other.
        """
        given = {name: getattr(self, name) for name in _SAME}
        given |= {
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "stop": _stop(self.stop, limits),
            "min_new_tokens": self.min_tokens,
            "logprobs": self.wanted_logprobs,
        }
        if self.use_beam_search:
            given |= {"num_beams": self.drawn, "num_return_sequences": self.drawn, "temperature": 0}
            given |= {name: getattr(self, name) for name in ("length_penalty", "early_stopping")}
        elif given["logprobs"] is None and (self.return_token_ids or self.drawn > (self.n or 1)):
            given["logprobs"] = 0
        forms = list(self._forms())
        if len(forms) > 1:
            raise invalid_request(
                f"an answer takes one form, and the request asks for {len(forms)}",
                forms[1][0],
            )
        for param, name, form in forms:
            text = form if isinstance(form, str) else json.dumps(form)
            if len(text) > limits.form_characters:
                raise invalid_request(
                    f"the form of an answer may have at most {limits.form_characters} characters",
                    param,
                )
            given[name] = form
        return without_none(given)

    def _forms(self) -> Iterator[tuple[str, str, Any]]:
        """Yields field, sampling parameter and value of each constraint on the answer's text."""
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


CONTENT = {"otherwise": "this server reads texts, and images in data URLs"}
"""The hint in errors about other kinds of message content."""


class ImageUrl(ClosedStruct):
    """An image as a data URL (``data:image/png;base64,...``); no address is fetched. Every image is read in
    full detail.
    """

    url: str
    detail: Literal["auto", "low", "high"] | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit for any other URL."""
        if not self.url.startswith(DATA):
            yield Misfit("/url", f"expected {DATA}png;base64,..., since no address is fetched")


class MessagePart(ClosedStruct):
    """A part of a message: a ``text``, or an image (``image_url``)."""

    type: Annotated[Literal["text", "image_url"], Meta(extra=CONTENT)]
    text: str | None = None
    image_url: ImageUrl | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit for a part without its content."""
        if getattr(self, self.type) is None:
            yield Misfit("", f"{self.type!r} is missing")
        elif self.image_url is not None:
            yield from (Misfit(f"/image_url{at}", what) for at, what in self.image_url.breaches())


class Message(ClosedStruct):
    """One message of a conversation. An assistant message may have the null fields of a response, so that
    clients can send it back unchanged.
    """

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[MessagePart] | None = None
    name: str | None = None
    tool_calls: list[InputCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits for parts without content, and for calls whose arguments are no JSON object."""
        yield from breaches_inside(self.content, "/content")
        yield from breaches_inside(self.tool_calls, "/tool_calls")

    @property
    def images(self) -> int:
        """The number of images in its content."""
        parts = self.content if isinstance(self.content, list) else ()
        return sum(part.type == "image_url" for part in parts)

    def render(self) -> Json:
        """Returns the message in the form that chat templates take; with images its content is parts."""
        content: str | list[Json]
        if self.images:
            content = [
                {"type": part.type, part.type: part.text if part.image_url is None else part.image_url.url}
                for part in self.content or ()
                if isinstance(part, MessagePart)
            ]
        elif isinstance(self.content, str):
            content = self.content
        else:
            content = "".join(part.text or "" for part in self.content or ())
        calls = [call.for_template() for call in self.tool_calls] if self.tool_calls else None
        named = {"name": self.name, "tool_call_id": self.tool_call_id, "tool_calls": calls}
        return {
            "role": self.role,
            "content": content,
            **without_none(named),
        }


_RENDERED = {"messages", "tools", "add_generation_prompt", "continue_final_message", "reasoning_effort"}
"""The variables of chat templates that have fields of their own."""


class ChatRequest(Sampled, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: PositiveWhole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: Json | None = None
    reasoning_effort: Annotated[str, Meta(max_length=64)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits for invalid messages, two token limits, and ``top_logprobs`` without
        ``logprobs``.
        """
        yield from super().breaches()
        yield from breaches_inside(self.messages, "/messages")
        for name in _RENDERED & (self.chat_template_kwargs or {}).keys():
            yield Misfit(f"/chat_template_kwargs/{name}", "the request's own fields say this")
        last = self.messages[-1]
        if self.continue_final_message and (last.images or last.tool_calls or self.add_generation_prompt):
            yield Misfit("/continue_final_message", "the last message is a text, and no new one begins")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            yield Misfit(
                "/max_completion_tokens",
                "max_tokens is the former name of max_completion_tokens: give one of them",
            )
        if self.top_logprobs is not None and not self.logprobs:
            yield Misfit("/top_logprobs", "top_logprobs goes with logprobs: true")

    @property
    def asked(self) -> list[str]:
        """The texts of the user's messages."""
        said = [message.content for message in self.messages if message.role == "user"]
        return [
            text if isinstance(text, str) else " ".join(part.text or "" for part in text or ())
            for text in said
        ]

    @property
    def template_values(self) -> Json:
        """What the chat template gets beside messages and tools."""
        given = {
            "reasoning_effort": self.reasoning_effort,
            "add_generation_prompt": self.add_generation_prompt,
        }
        return {
            **(self.chat_template_kwargs or {}),
            **without_none(given),
            "continue_final_message": bool(self.continue_final_message),
        }

    def conversation(self) -> list[Json]:
        """Returns the messages in the form that chat templates take. A tool's message gets the name of the
        tool that was called.
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
        """The most tokens of an answer; None lets it run to the end of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """The number of likely tokens to list at each position, or None for no log-probabilities."""
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(Sampled, kw_only=True):
    """``POST /v1/completions``. A prompt is a text or a list of token ids, or several of one kind; texts are
    read without a chat template. With ``max_tokens`` 0 nothing follows it.
    """

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: PositiveWhole | None = None
    max_tokens: Whole | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits for prompts of several kinds, and for a ``best_of`` that chooses nothing."""
        yield from super().breaches()
        yield from one_kind("prompt", self.prompt)
        if self.best_of is not None and (
            self.best_of < (self.n or 1) or self.stream or self.use_beam_search or self.max_tokens == 0
        ):
            yield Misfit("/best_of", "the best n of so many answers, and neither in a stream nor of beams")

    @property
    def drawn(self) -> int:
        """The number of answers to each prompt that are made, of which the best ``n`` are given."""
        return self.best_of or self.n or 1

    @property
    def wanted_scores(self) -> int | None:
        """Those of ``prompt_logprobs``, or of ``logprobs`` if the prompt is echoed."""
        wanted = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in wanted if count is not None), default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts; each gets ``n`` answers."""
        return as_list(self.prompt)

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer; 16 if the request does not say, as in OpenAI's API."""
        return 16 if self.max_tokens is None else max(1, self.max_tokens)

    @property
    def wanted_logprobs(self) -> int | None:
        """The field ``logprobs``, which is a number on this route."""
        return self.logprobs


def one_kind(field_name: str, given: Any) -> Iterator[Misfit]:
    """Yields a misfit if a field has values of several kinds."""
    if isinstance(given, list) and len({type(item) for item in given}) > 1:
        yield Misfit(f"/{field_name}", "these are all texts, or all lists of token ids")


def as_list(given: Any) -> list[Any]:
    """Returns the values of a field that takes one value or several. A list of numbers is one value.

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
        raise invalid_request(
            f"a request may have at most {limits.stop} stop texts of {limits.stop_characters} characters",
            "stop",
        )
    return texts
