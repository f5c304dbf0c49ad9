"""The answers of Anthropic's ``/v1/messages`` and how they are written: as a list of blocks, or as the events
from which a client builds that list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ...http import HTTPError
from ...io import FrozenStruct
from ...runtime import CallReader, SampledToken
from ..openai import ErrorForm, MessageReader, Provenance, ResponseWriter, Usage, call_id
from ..scheduling import SequenceOutput
from .message_requests import MessagesRequest

_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""HTTP status -> Anthropic's type of error. Others are ``invalid_request_error``, from 500 on
``api_error``.
"""
_REASONS = {"tool_calls": "tool_use", "length": "max_tokens"}


class MessageErrorDetails(FrozenStruct):
    """An error: its type, a sentence, the field at fault, and a stable code for programs."""

    type: str
    message: str
    param: str | None
    code: str


class MessageError(FrozenStruct):
    """The body of every error response, and the last event of a stream that fails."""

    error: MessageErrorDetails
    type: Literal["error"] = "error"


def _error(refused: HTTPError) -> MessageError:
    kind = _ERRORS.get(refused.status, "api_error" if refused.status >= 500 else "invalid_request_error")
    return MessageError(MessageErrorDetails(kind, refused.what, refused.more.get("param"), refused.name))


ANTHROPIC = ErrorForm(MessageError, _error)


class MessageText(FrozenStruct, tag="text", tag_field="type"):
    """A text of the model."""

    text: str
    citations: None = None


class MessageCall(FrozenStruct, tag="tool_use", tag_field="type"):
    """A call of a tool. In a stream its input comes in pieces of JSON after it."""

    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(FrozenStruct):
    """The token counts: prompt tokens that had to be read, those that were known, and the answer's."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0

    @classmethod
    def of(cls, usage: Usage) -> MessageUsage:
        """Converts the usage to this route's field names."""
        known = usage.prompt_tokens_details.cached_tokens
        return cls(usage.prompt_tokens - known, usage.completion_tokens, known)


class TokensCount(FrozenStruct):
    """The response of ``/v1/messages/count_tokens``."""

    input_tokens: int


class MessageAnswer(FrozenStruct, kw_only=True):
    """The response of ``/v1/messages``."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[MessageText | MessageCall]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    adapterpack: Provenance


class MessageDelta(FrozenStruct, kw_only=True):
    """What an event adds to a block, or to the message at its end."""

    type: Literal["text_delta", "input_json_delta"] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: str | UnsetType | None = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessageEvent(FrozenStruct, kw_only=True):
    """An event of a stream. Its type determines which fields it has."""

    type: str
    message: MessageAnswer | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: MessageText | MessageCall | UnsetType = UNSET
    delta: MessageDelta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET


class MessagesWriter(ResponseWriter):
    """Writes the single answer of a request as a list of texts and calls."""

    end = b""
    waits = True  # the first event says how much of the prompt was known

    def __init__(
        self, body: MessagesRequest, provenance: Provenance, calls: Callable[[], CallReader] | None
    ) -> None:
        super().__init__("msg", body.model, provenance)
        self._body = body
        self._reader = MessageReader(calls)
        self._row = SequenceOutput()
        self._content: list[MessageText | MessageCall] = []
        self._block: MessageText | MessageCall | None = None
        self._text = ""
        """The text of the current block, or the input of the current call."""

    def event(self, value: Any) -> bytes:
        """Encodes an event with its type as the event name."""
        kind: str = value.type
        return b"event: " + kind.encode() + b"\n" + super().event(value)

    def error(self, refused: HTTPError) -> bytes:
        """Encodes an error as the last event of a stream."""
        return self.event(_error(refused))

    def write_response(self, sequences: Sequence[SequenceOutput], usage: Usage) -> MessageAnswer:
        """Returns the complete response for the request's only row."""
        (self._row,) = sequences
        self.write_piece(0, self._row.text, (), self._row.reason)
        return self._answer(usage)

    def write_start(self, place: int, row: SequenceOutput) -> list[Any]:
        """Returns the event that announces the message."""
        self._row = row
        usage = msgspec.structs.replace(self.usage or Usage(0, 0, 0), completion_tokens=0)
        return [MessageEvent(type="message_start", message=self._answer(usage))]

    def write_piece(
        self, place: int, text: str, choices: Sequence[SampledToken], reason: str | None
    ) -> list[Any]:
        """Returns the events for new text: starts, pieces and ends of texts and calls."""
        events = []
        for piece in self._reader.read(text, reason is not None):
            match piece.kind:
                case "text":
                    if not isinstance(self._block, MessageText):
                        events += [*self._close(), *self._open(MessageText(""))]
                    events.append(self._add(MessageDelta(type="text_delta", text=piece.value)))
                case "name":
                    call = MessageCall(f"toolu_{call_id()}", piece.value, {})
                    events += [*self._close(), *self._open(call)]
                case "arguments":
                    events.append(self._add(MessageDelta(type="input_json_delta", partial_json=piece.value)))
                case "end":
                    events += self._close()
        return events if reason is None else [*events, *self._close()]

    def write_end(self, usage: Usage) -> list[Any]:
        """Returns the events with the reason of the end and the token counts."""
        answer = self._answer(usage)
        delta = MessageDelta(stop_reason=answer.stop_reason, stop_sequence=answer.stop_sequence)
        return [
            MessageEvent(type="message_delta", delta=delta, usage=answer.usage),
            MessageEvent(type="message_stop"),
        ]

    def _open(self, block: MessageText | MessageCall) -> list[MessageEvent]:
        """Starts a block."""
        self._block = block
        self._text = ""
        return [MessageEvent(type="content_block_start", index=len(self._content), content_block=block)]

    def _add(self, delta: MessageDelta) -> MessageEvent:
        """Adds to the current block."""
        self._text += delta.text or delta.partial_json or ""
        return MessageEvent(type="content_block_delta", index=len(self._content), delta=delta)

    def _close(self) -> list[MessageEvent]:
        """Ends the current block, if there is one."""
        block = self._block
        self._block = None
        if block is None:
            return []
        if isinstance(block, MessageText):
            block = MessageText(self._text)
        else:
            with suppress(ValueError):  # cut off, as the reason of the end says
                block = msgspec.structs.replace(block, input=json.loads(self._text))
        self._content.append(block)
        return [MessageEvent(type="content_block_stop", index=len(self._content) - 1)]

    def _answer(self, usage: Usage) -> MessageAnswer:
        reason = self._reader.reason(self._row.reason)
        stop = None
        if reason == "stop" and self._row.stop in (self._body.stop_sequences or ()):
            stop = str(self._row.stop)
        named = None if reason is None else _REASONS.get(reason, "stop_sequence" if stop else "end_turn")
        ended = bool(self._content)
        return MessageAnswer(
            id=self.id,
            model=self.head["model"],
            content=list(self._content) if ended or reason is None else [MessageText("")],
            stop_reason=named,
            stop_sequence=stop,
            usage=MessageUsage.of(usage),
            adapterpack=self.provenance,
        )
