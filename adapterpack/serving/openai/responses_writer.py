"""The responses of OpenAI's ``/v1/responses`` and how they are written: as a list of items, or as the events
from which a client builds that list.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ...io import FrozenStruct
from ...runtime import CallReader, SampledToken
from ..scheduling import SequenceOutput
from .answers import Provenance, Usage
from .requests import PlainText
from .response_requests import NamedTool, ResponseRequest, ResponseTool, TextConfig
from .response_writer import MessageReader, ResponseWriter, call_id

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(msgspec.Struct, frozen=True, tag="output_text", tag_field="type"):
    """The text of a message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(FrozenStruct, tag="message", tag_field="type"):
    """A message that the model wrote."""

    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputCall(FrozenStruct, tag="function_call", tag_field="type"):
    """A function call of the model; ``arguments`` is a JSON text."""

    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class IncompleteDetails(FrozenStruct):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class InputDetails(FrozenStruct):
    """Prompt tokens that were known from earlier requests, and those that were kept: always counted none."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(FrozenStruct):
    """Tokens that are not in the answer: always none."""

    reasoning_tokens: int = 0


class ResponseUsage(FrozenStruct):
    """The token counts of a response."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens_details: OutputDetails = OutputDetails()

    @classmethod
    def of(cls, usage: Usage) -> ResponseUsage:
        """Converts the usage to this route's field names."""
        known = InputDetails(usage.prompt_tokens_details.cached_tokens)
        return cls(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, known)


class ResponseAnswer(FrozenStruct, kw_only=True):
    """The response of ``/v1/responses``. Nothing is stored."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None
    text: TextConfig
    tool_choice: Literal["none", "auto", "required"] | NamedTool
    tools: list[ResponseTool]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    metadata: dict[str, str]
    usage: ResponseUsage | None
    system_fingerprint: str
    adapterpack: Provenance


class ResponseEvent(FrozenStruct, kw_only=True, omit_defaults=True):
    """An event of a stream. Its type determines which fields it has."""

    type: str
    sequence_number: int
    response: ResponseAnswer | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item: OutputMessage | OutputCall | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET


class ResponsesWriter(ResponseWriter):
    """Writes the single answer of a request as a sequence of messages and calls."""

    end = b""

    def __init__(
        self, body: ResponseRequest, provenance: Provenance, calls: Callable[[], CallReader] | None
    ) -> None:
        super().__init__("resp", body.model, provenance)
        self._body = body
        self._reader = MessageReader(calls)
        self._output: list[OutputMessage | OutputCall] = []
        # the id of the current message; its text, or the arguments of the current call
        self._message, self._text = "", ""
        self._call: OutputCall | None = None  # the current call
        self._reason: str | None = None
        self._number = -1

    def event(self, value: Any) -> bytes:
        """Encodes an event with its type as the event name."""
        named = b"event: " + value.type.encode() + b"\n" if isinstance(value, ResponseEvent) else b""
        return named + super().event(value)

    def write_response(self, sequences: Sequence[SequenceOutput], usage: Usage) -> ResponseAnswer:
        """Returns the complete response for the request's only row."""
        (row,) = sequences
        self.write_piece(0, row.text, (), row.reason)
        return self._answer(usage)

    def write_start(self, place: int, row: SequenceOutput) -> list[Any]:
        """Returns the events that announce the response."""
        return [
            self._event(name, response=self._answer(None))
            for name in ("response.created", "response.in_progress")
        ]

    def write_piece(
        self, place: int, text: str, choices: Sequence[SampledToken], reason: str | None
    ) -> list[Any]:
        """Returns the events for new text: parts, starts and ends of messages and calls."""
        self._reason = reason
        events = []
        for piece in self._reader.read(text, reason is not None):
            match piece.kind:
                case "text":
                    events += self._write_text(piece.value)
                case "name":
                    events += [*self._close_message(), *self._open_call(piece.value)]
                case "arguments":
                    events += self._write_arguments(piece.value)
                case "end":
                    events += self._close_call("completed")
        if reason is not None:
            nothing = not (self._message or self._call or self._output)
            events += [
                *(self._open_message() if nothing else ()),
                *self._close_message(),
                *self._close_call("incomplete"),
            ]
        return events

    def write_end(self, usage: Usage) -> list[Any]:
        """Returns the event with the complete response."""
        answer = self._answer(usage)
        return [self._event(f"response.{answer.status}", response=answer)]

    def _write_text(self, text: str) -> list[ResponseEvent]:
        events = [] if self._message else self._open_message()
        self._text += text
        return [
            *events,
            self._event(
                "response.output_text.delta",
                item_id=self._message,
                output_index=len(self._output),
                content_index=0,
                delta=text,
                logprobs=[],
            ),
        ]

    def _open_message(self) -> list[ResponseEvent]:
        """Starts a message."""
        self._message = f"msg_{secrets.token_hex(12)}"
        self._text = ""
        index = len(self._output)
        return [
            self._event(
                "response.output_item.added",
                output_index=index,
                item=OutputMessage(self._message, "in_progress", []),
            ),
            self._event(
                "response.content_part.added",
                item_id=self._message,
                output_index=index,
                content_index=0,
                part=OutputText(""),
            ),
        ]

    def _close_message(self) -> list[ResponseEvent]:
        """Ends the current message, if there is one."""
        if not self._message:
            return []
        part = OutputText(self._text)
        index = len(self._output)
        message = OutputMessage(
            self._message, "incomplete" if self._reason == "length" else "completed", [part]
        )
        self._output.append(message)
        self._message = ""
        place: dict[str, Any] = {"item_id": message.id, "output_index": index, "content_index": 0}
        return [
            self._event("response.output_text.done", **place, text=part.text, logprobs=[]),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=index, item=message),
        ]

    def _open_call(self, name: str) -> list[ResponseEvent]:
        """Starts a call."""
        self._call = OutputCall(f"fc_{secrets.token_hex(12)}", "in_progress", call_id(), name, "")
        self._text = ""
        return [self._event("response.output_item.added", output_index=len(self._output), item=self._call)]

    def _write_arguments(self, text: str) -> list[ResponseEvent]:
        """Appends to the arguments of the current call."""
        assert self._call is not None
        self._text += text
        return [
            self._event(
                "response.function_call_arguments.delta",
                item_id=self._call.id,
                output_index=len(self._output),
                delta=text,
            )
        ]

    def _close_call(self, status: Status) -> list[ResponseEvent]:
        """Ends the current call, if there is one."""
        if self._call is None:
            return []
        item = msgspec.structs.replace(self._call, status=status, arguments=self._text)
        index = len(self._output)
        self._output.append(item)
        self._call = None
        return [
            self._event(
                "response.function_call_arguments.done",
                item_id=item.id,
                output_index=index,
                name=item.name,
                arguments=item.arguments,
            ),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(type=kind, sequence_number=self._number, **fields)

    def _answer(self, usage: Usage | None) -> ResponseAnswer:
        body = self._body
        cut = usage is not None and self._reason == "length"
        return ResponseAnswer(
            id=self.id,
            created_at=self.created,
            model=self.head["model"],
            output=list(self._output),
            status="in_progress" if usage is None else "incomplete" if cut else "completed",
            incomplete_details=IncompleteDetails("max_output_tokens") if cut else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=body.temperature,
            text=body.text or TextConfig(PlainText()),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_p=body.top_p,
            metadata=body.metadata or {},
            usage=None if usage is None else ResponseUsage.of(usage),
            system_fingerprint=self.provenance.digest,
            adapterpack=self.provenance,
        )
