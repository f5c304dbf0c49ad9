"""Writes responses in the forms of the chat and completions routes. Each route has a class with the same
methods.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from ...runtime.generation.sampler import SampledToken
from ...runtime.tools.family import Call
from ...runtime.tools.reader import AnswerPiece, CallReader
from ..scheduling.rows import SequenceOutput
from .answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    FunctionCall,
    FunctionDelta,
    Provenance,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from .requests import Sampled
from .token_texts import TokenTexts

DONE = b"data: [DONE]\n\n"
ALIVE = b": still working\n\n"
"""A comment that keeps proxies from closing idle connections."""
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
STREAM_TYPE = "text/event-stream"
LEAST = -9999.0
"""The log-probability of an impossible token, as in OpenAI's API: JSON has no infinity."""


class ResponseWriter:
    """Writes the response to one request, and the chunks of its stream, each of the struct ``chunk``; ``end``
    is the mark that ends a stream. If the usage is ``counted``, it is null in all chunks but the last.
    """

    chunk: type[Any]
    end = DONE

    def __init__(self, prefix: str, model: str, provenance: Provenance, counted: bool = False) -> None:
        self.id, self.created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
        self.provenance, self.counted = provenance, counted
        self.head: dict[str, Any] = {
            "id": self.id,
            "created": self.created,
            "model": model,
            "system_fingerprint": provenance.digest,
        }
        """The fields that all objects of the response share."""

    def event(self, value: Any) -> bytes:
        """Encodes a chunk, or an error, as a server-sent event."""
        return b"data: " + msgspec.json.encode(value) + b"\n\n"

    def write_response(self, sequences: Sequence[SequenceOutput], usage: Usage) -> Any:
        """Returns the complete response."""
        raise NotImplementedError

    def write_start(self, place: int) -> list[Any]:
        """Returns the chunks before a row's first token."""
        raise NotImplementedError

    def write_piece(
        self, place: int, text: str, choices: Sequence[SampledToken], reason: str | None
    ) -> list[Any]:
        """Returns the chunks for a row's text since the last call, and for its end."""
        raise NotImplementedError

    def write_end(self, usage: Usage) -> list[Any]:
        """Returns the chunks after the last token: one with the usage and without choices, if it counts."""
        return [self.chunk(**self.head, choices=[], usage=usage)] if self.counted else []

    def write_chunk(self, choice: Any, provenance: Provenance | UnsetType = UNSET) -> Any:
        """Returns a chunk with a piece of one answer."""
        usage = None if self.counted else UNSET
        return self.chunk(**self.head, choices=[choice], usage=usage, adapterpack=provenance)


def _counts(body: Sampled) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


class MessageReader:
    """Splits the output of one row into text and tool calls. ``calls`` makes the reader of calls, if the row
    may have any.
    """

    def __init__(self, calls: Callable[[], CallReader] | None) -> None:
        self._reader, self._text = None if calls is None else calls(), ""

    def read(self, text: str, ended: bool) -> list[AnswerPiece]:
        """Takes more text, and returns the new pieces of the message."""
        self._text += text
        if self._reader is None:
            return [AnswerPiece("text", text)] if text else []
        return self._reader.read(self._text, ended)

    @property
    def text(self) -> str:
        """The text outside of calls."""
        return self._text if self._reader is None else self._reader.text

    @property
    def calls(self) -> list[Call]:
        """The calls so far."""
        return [] if self._reader is None else self._reader.calls

    def reason(self, reason: str | None) -> str | None:
        """Returns why the message ended: ``tool_calls`` if it stopped and has calls."""
        return "tool_calls" if reason == "stop" and self.calls else reason


def call_id() -> str:
    """Returns a new id for a call. Mistral's templates accept only nine letters and digits; others accept
    anything.
    """
    return secrets.token_hex(5)[:9]


class ChatWriter(ResponseWriter):
    """Writes messages of ``/v1/chat/completions``. ``calls`` makes the reader of tool calls for one answer,
    if it may have any.
    """

    chunk = ChatChunk

    def __init__(
        self,
        body: Sampled,
        provenance: Provenance,
        tokens: TokenTexts,
        calls: Callable[[], CallReader] | None = None,
    ) -> None:
        super().__init__("chatcmpl", body.model, provenance, _counts(body))
        self._tokens, self._calls = tokens, calls
        self._readers: dict[int, MessageReader] = {}

    def write_response(self, sequences: Sequence[SequenceOutput], usage: Usage) -> ChatCompletion:
        """Returns all messages."""
        choices = []
        for place, row in enumerate(sequences):
            reader = MessageReader(self._calls)
            reader.read(row.text, True)
            calls = [ToolCall(call_id(), FunctionCall(*call)) for call in reader.calls]
            message = AnswerMessage(
                "assistant", None if calls and not reader.text else reader.text, None, calls or UNSET
            )
            choices.append(ChatChoice(place, message, self._logprobs(row.choices), reader.reason(row.reason)))
        return ChatCompletion(**self.head, choices=choices, usage=usage, adapterpack=self.provenance)

    def write_start(self, place: int) -> list[Any]:
        """Returns the chunk with the role; that of the first message also has the provenance."""
        choice = ChatChunkChoice(place, Delta("assistant", ""))
        return [self.write_chunk(choice, UNSET if place else self.provenance)]

    def write_piece(
        self, place: int, text: str, choices: Sequence[SampledToken], reason: str | None
    ) -> list[Any]:
        """Returns chunks with new text and calls; the finish reason has a chunk of its own."""
        reader = self._readers.setdefault(place, MessageReader(self._calls))
        number = len(reader.calls) - 1
        deltas: list[Delta] = []
        for piece in reader.read(text, reason is not None):
            number += piece.kind == "name"
            deltas += _delta(piece, number)
        if choices and not deltas:
            deltas.append(Delta(content=""))
        parts = [
            ChatChunkChoice(place, delta, None if after else self._logprobs(choices))
            for after, delta in enumerate(deltas)
        ]
        if reason is not None:
            parts.append(ChatChunkChoice(place, Delta(), None, reader.reason(reason)))
        return [self.write_chunk(part) for part in parts]

    def _logprobs(self, choices: Sequence[SampledToken]) -> ChatLogprobs | None:
        if not choices:
            return None
        return ChatLogprobs(
            [
                TokenLogprob(
                    **self._token(choice.token, choice.logprob or 0.0),
                    top_logprobs=[
                        TopLogprob(**self._token(token, logprob)) for token, logprob in choice.top_logprobs
                    ],
                )
                for choice in choices
            ]
        )

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self._tokens.of(token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(data)}


def _delta(piece: AnswerPiece, number: int) -> list[Delta]:
    """Converts a piece of an answer to deltas; ``number`` is the index of its call."""
    match piece.kind:
        case "text":
            return [Delta(content=piece.value)]
        case "name":
            return [
                Delta(
                    tool_calls=[ToolCallDelta(number, FunctionDelta("", piece.value), call_id(), "function")]
                )
            ]
        case "arguments":
            return [Delta(tool_calls=[ToolCallDelta(number, FunctionDelta(piece.value))])]
        case "end":
            return []


class CompletionWriter(ResponseWriter):
    """Writes texts of ``/v1/completions``. ``echoes`` are the prompts, if the request echoes them."""

    chunk = Completion

    def __init__(
        self, body: Sampled, provenance: Provenance, tokens: TokenTexts, echoes: Sequence[str] = ()
    ) -> None:
        super().__init__("cmpl", body.model, provenance, _counts(body))
        self._tokens, self._echoes = tokens, echoes
        self._offsets: dict[int, int] = {}

    def write_response(self, sequences: Sequence[SequenceOutput], usage: Usage) -> Completion:
        """Returns all texts."""
        choices = [
            CompletionChoice(
                place, self._echo(place) + row.text, self._logprobs(place, row.choices), row.reason
            )
            for place, row in enumerate(sequences)
        ]
        return Completion(**self.head, choices=choices, usage=usage, adapterpack=self.provenance)

    def write_start(self, place: int) -> list[Any]:
        """Returns the prompt, if the request echoes it."""
        return [self.write_chunk(CompletionChoice(place, self._echo(place)))] if self._echoes else []

    def write_piece(
        self, place: int, text: str, choices: Sequence[SampledToken], reason: str | None
    ) -> list[Any]:
        """Returns a chunk with new text; the last one has the finish reason and the provenance."""
        if not text and not choices and reason is None:
            return []
        choice = CompletionChoice(place, text, self._logprobs(place, choices), reason)
        return [self.write_chunk(choice, UNSET if reason is None else self.provenance)]

    def _echo(self, place: int) -> str:
        return self._echoes[place] if self._echoes else ""

    def _logprobs(self, place: int, choices: Sequence[SampledToken]) -> CompletionLogprobs | None:
        if not choices:
            return None
        result = CompletionLogprobs([], [], [], [])
        for choice in choices:
            text, _ = self._tokens.of(choice.token)
            result.text_offset.append(self._offsets.get(place, 0))
            self._offsets[place] = self._offsets.get(place, 0) + len(text)
            result.tokens.append(text)
            result.token_logprobs.append(max(choice.logprob or 0.0, LEAST))
            result.top_logprobs.append(
                {self._tokens.of(token)[0]: max(logprob, LEAST) for token, logprob in choice.top_logprobs}
            )
        return result
