"""Writes responses: as a message of a conversation, or as text. One class for each route, with the same
methods.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from ...runtime.generation.sampler import SampledToken
from ...runtime.tools.family import Call
from ...runtime.tools.reader import AnswerPiece, CallReader
from ..scheduling.rows import SequenceOutput
from . import sse
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
from .token_texts import TokenTexts

LEAST = -9999.0
"""What stands for a probability of nothing, as OpenAI has it: JSON has no infinity."""


class ResponseHead:
    """The fields with which all objects of one response begin."""

    def __init__(self, prefix: str, model: str, provenance: Provenance) -> None:
        self.id, self.created, self.model = f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model
        self.provenance = provenance

    def fields(self) -> dict[str, Any]:
        """The fields by name."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.provenance.digest,
        }


class ResponseWriter:
    """Writes the response to one request. ``usage`` of a chunk is left out, or null until the last one;
    ``end`` ends a stream.
    """

    head: ResponseHead
    end = sse.DONE

    def event(self, value: Any) -> bytes:
        """A chunk as a server-sent event."""
        return sse.event(value)

    def write_response(self, sequences: Sequence[SequenceOutput], usage: Usage) -> Any:
        """The complete response."""
        raise NotImplementedError

    def write_start(self, place: int, usage: UnsetType | None) -> list[Any]:
        """The chunks before a row's first token."""
        raise NotImplementedError

    def write_piece(
        self,
        place: int,
        text: str,
        choices: Sequence[SampledToken],
        reason: str | None,
        usage: UnsetType | None,
    ) -> list[Any]:
        """The chunks for the text that a row has produced since the last one, and for its end."""
        raise NotImplementedError

    def write_end(self, usage: Usage, counted: bool) -> list[Any]:
        """The chunks after the last token; with ``counted`` they have the usage."""
        return [self.write_usage(usage)] if counted else []

    def write_usage(self, usage: Usage) -> Any:
        """The chunk with the usage of tokens."""
        raise NotImplementedError


class MessageReader:
    """Splits the output of one row into text and calls of tools; ``calls`` makes the reader of calls, where
    there may be some.
    """

    def __init__(self, calls: Callable[[], CallReader] | None) -> None:
        self._reader, self._text = None if calls is None else calls(), ""

    def read(self, text: str, ended: bool) -> list[AnswerPiece]:
        """Reads further text, and says what it adds to the message."""
        self._text += text
        if self._reader is None:
            return [AnswerPiece("text", text)] if text else []
        return self._reader.read(self._text, ended)

    @property
    def text(self) -> str:
        """The text that is no call."""
        return self._text if self._reader is None else self._reader.text

    @property
    def calls(self) -> list[Call]:
        """The calls so far."""
        return [] if self._reader is None else self._reader.calls

    def reason(self, reason: str | None) -> str | None:
        """Why the message ended."""
        return "tool_calls" if reason == "stop" and self.calls else reason


def call_id() -> str:
    """The id of a call: templates of Mistral take nine letters and digits only, and others any."""
    return secrets.token_hex(5)[:9]


class ChatWriter(ResponseWriter):
    """Messages of ``/v1/chat/completions``; ``calls`` makes what reads the calls of tools in one answer,
    where it may have some.
    """

    def __init__(
        self,
        model: str,
        provenance: Provenance,
        tokens: TokenTexts,
        calls: Callable[[], CallReader] | None = None,
    ) -> None:
        self.head, self._tokens, self._calls = ResponseHead("chatcmpl", model, provenance), tokens, calls
        self._readers: dict[int, MessageReader] = {}

    def write_response(self, sequences: Sequence[SequenceOutput], usage: Usage) -> ChatCompletion:
        """All messages, complete."""
        choices = []
        for place, row in enumerate(sequences):
            reader = MessageReader(self._calls)
            reader.read(row.text, True)
            calls = [ToolCall(call_id(), FunctionCall(*call)) for call in reader.calls]
            message = AnswerMessage(
                "assistant", None if calls and not reader.text else reader.text, None, calls or UNSET
            )
            choices.append(ChatChoice(place, message, self._logprobs(row.choices), reader.reason(row.reason)))
        return ChatCompletion(
            **self.head.fields(), choices=choices, usage=usage, adapterpack=self.head.provenance
        )

    def write_start(self, place: int, usage: UnsetType | None) -> list[Any]:
        """The role of who speaks, and with the first one what answers."""
        return [
            ChatChunk(
                **self.head.fields(),
                choices=[ChatChunkChoice(place, Delta("assistant", ""))],
                usage=usage,
                adapterpack=UNSET if place else self.head.provenance,
            )
        ]

    def write_piece(
        self,
        place: int,
        text: str,
        choices: Sequence[SampledToken],
        reason: str | None,
        usage: UnsetType | None,
    ) -> list[Any]:
        """Chunks with further text; the reason of the end has a chunk of its own."""
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
        return [ChatChunk(**self.head.fields(), choices=[part], usage=usage) for part in parts]

    def write_usage(self, usage: Usage) -> ChatChunk:
        """The chunk with the usage, which has no choices."""
        return ChatChunk(**self.head.fields(), choices=[], usage=usage)

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
    """What a piece adds to a message, as a chunk has it; ``number`` is that of the call."""
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
    """Texts of ``/v1/completions``; ``echoes`` are the prompts, where they come first."""

    def __init__(
        self, model: str, provenance: Provenance, tokens: TokenTexts, echoes: Sequence[str] = ()
    ) -> None:
        self.head, self._tokens, self._echoes = ResponseHead("cmpl", model, provenance), tokens, echoes
        self._offsets: dict[int, int] = {}

    def write_response(self, sequences: Sequence[SequenceOutput], usage: Usage) -> Completion:
        """All texts, complete."""
        choices = [
            CompletionChoice(
                place, self._echo(place) + row.text, self._logprobs(place, row.choices), row.reason
            )
            for place, row in enumerate(sequences)
        ]
        return Completion(
            **self.head.fields(), choices=choices, usage=usage, adapterpack=self.head.provenance
        )

    def write_start(self, place: int, usage: UnsetType | None) -> list[Any]:
        """The prompt, where it is wanted."""
        if not self._echoes:
            return []
        return [
            Completion(
                **self.head.fields(), choices=[CompletionChoice(place, self._echo(place))], usage=usage
            )
        ]

    def write_piece(
        self,
        place: int,
        text: str,
        choices: Sequence[SampledToken],
        reason: str | None,
        usage: UnsetType | None,
    ) -> list[Any]:
        """A chunk with further text; the last one has the reason of the end, and says what answered."""
        if not text and not choices and reason is None:
            return []
        choice = CompletionChoice(place, text, self._logprobs(place, choices), reason)
        return [
            Completion(
                **self.head.fields(),
                choices=[choice],
                usage=usage,
                adapterpack=UNSET if reason is None else self.head.provenance,
            )
        ]

    def write_usage(self, usage: Usage) -> Completion:
        """The chunk with the usage, which has no choices."""
        return Completion(**self.head.fields(), choices=[], usage=usage)

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
