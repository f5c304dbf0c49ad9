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

from ...http import HTTPError
from ...runtime import CallReader, SampledToken
from ...runtime.tools.family import Call
from ...runtime.tools.reader import AnswerPiece
from ..scheduling import SequenceOutput
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
    PromptLogprob,
    PromptLogprobs,
    Provenance,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from .errors import details
from .requests import CompletionRequest, Sampled, StreamOptions
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
    is the mark that ends a stream. If the usage is ``counted``, it is null in all chunks but the last, or the
    ``usage`` so far if it counts ``on``. A writer that ``waits`` starts a row once its prompt has been read.
    """

    chunk: type
    end = DONE
    waits = on = False
    usage: Usage | None = None

    def __init__(self, prefix: str, model: str, provenance: Provenance, counted: bool = False) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.provenance, self.counted = provenance, counted
        self.head: dict[str, Any] = {
            "id": self.id,
            "created": self.created,
            "model": provenance.called(model),
            "system_fingerprint": provenance.digest,
        }
        """The fields that all objects of the response share."""

    def event(self, value: Any) -> bytes:
        """Encodes a chunk, or an error, as a server-sent event."""
        return b"data: " + msgspec.json.encode(value) + b"\n\n"

    def error(self, refused: HTTPError) -> bytes:
        """Encodes an error as the last event of a stream."""
        return self.event(details(refused))

    def write_response(self, sequences: Sequence[SequenceOutput], usage: Usage) -> Any:
        """Returns the complete response."""
        raise NotImplementedError

    def write_start(self, place: int, row: SequenceOutput) -> list[Any]:
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

    def write_chunk(self, choice: Any, provenance: Provenance | UnsetType = UNSET, **more: Any) -> Any:
        """Returns a chunk with a piece of one answer."""
        usage = (self.usage if self.on else None) if self.counted else UNSET
        return self.chunk(**self.head, choices=[choice], usage=usage, adapterpack=provenance, **more)


class TokenWriter(ResponseWriter):
    """Writes what requests of :class:`.Sampled` want to know of tokens: ``prompts`` are those of its prompts,
    each with ``draws`` answers.
    """

    def __init__(
        self,
        prefix: str,
        body: Sampled,
        provenance: Provenance,
        tokens: TokenTexts,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        options = body.stream_options or StreamOptions()
        super().__init__(prefix, body.model, provenance, bool(options.include_usage))
        self.on = bool(options.continuous_usage_stats)
        self._tokens = tokens
        self._prompts = prompts
        self._draws = body.n or 1
        self._listed = body.wanted_logprobs is not None
        self._ids = bool(body.return_token_ids)
        self._scores = body.prompt_logprobs

    def token_ids(self, choices: Sequence[SampledToken]) -> list[int] | UnsetType:
        """Returns the ids of tokens, if the request asks for them."""
        return [choice.token for choice in choices] if self._ids else UNSET

    def prompt_token_ids(self, place: int) -> list[int] | UnsetType:
        """Returns the ids of a row's prompt, if the request asks for them."""
        return list(self._prompts[place // self._draws]) if self._ids else UNSET

    def prompt_logprobs(self, row: SequenceOutput) -> PromptLogprobs | UnsetType:
        """Returns the log-probabilities of a row's prompt, if the request asks for them."""
        count = self._scores
        if count is None:
            return UNSET
        result: PromptLogprobs = []
        for token, logprob, top in row.scored:
            ranked: dict[int, tuple[float, int | None]] = {
                one: (value, rank) for rank, (one, value) in enumerate(top, 1)
            }
            listed = dict(list(ranked.items())[:count])
            if logprob is not None:
                listed[token] = ranked.get(token, (logprob, None))
            result.append(
                None
                if logprob is None
                else {
                    str(one): PromptLogprob(max(value, LEAST), rank, self._tokens.of(one)[0])
                    for one, (value, rank) in listed.items()
                }
            )
        return result


class MessageReader:
    """Splits the output of one row into text and tool calls. ``calls`` makes the reader of calls, if the row
    may have any.
    """

    def __init__(self, calls: Callable[[], CallReader] | None) -> None:
        self._reader = None if calls is None else calls()
        self._text = ""

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


class ChatWriter(TokenWriter):
    """Writes messages of ``/v1/chat/completions``. ``calls`` makes the reader of tool calls for one answer,
    if it may have any.
    """

    chunk = ChatChunk

    def __init__(
        self,
        body: Sampled,
        provenance: Provenance,
        tokens: TokenTexts,
        prompts: Sequence[Sequence[int]],
        calls: Callable[[], CallReader] | None = None,
    ) -> None:
        super().__init__("chatcmpl", body, provenance, tokens, prompts)
        self._calls = calls
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
            logprobs = self._logprobs(row.choices)
            reason = reader.reason(row.reason)
            choices.append(ChatChoice(place, message, logprobs, reason, self.token_ids(row.choices)))
        return ChatCompletion(
            **self.head,
            choices=choices,
            usage=usage,
            adapterpack=self.provenance,
            prompt_logprobs=self.prompt_logprobs(sequences[0]),
            prompt_token_ids=self.prompt_token_ids(0),
        )

    def write_start(self, place: int, row: SequenceOutput) -> list[Any]:
        """Returns the chunk with the role; that of the first message also has the provenance."""
        choice = ChatChunkChoice(place, Delta("assistant", ""))
        if place:
            return [self.write_chunk(choice)]
        return [self.write_chunk(choice, self.provenance, prompt_token_ids=self.prompt_token_ids(0))]

    def write_piece(
        self, place: int, text: str, choices: Sequence[SampledToken], reason: str | None
    ) -> list[Any]:
        """Returns chunks with new text and calls; the finish reason has a chunk of its own."""
        reader = self._readers.setdefault(place, MessageReader(self._calls))
        number = len(reader.calls) - 1
        deltas = []
        for piece in reader.read(text, reason is not None):
            number += piece.kind == "name"
            deltas += _delta(piece, number)
        if choices and not deltas:
            deltas.append(Delta(content=""))
        parts = [
            ChatChunkChoice(place, delta)
            if after
            else ChatChunkChoice(place, delta, self._logprobs(choices), None, self.token_ids(choices))
            for after, delta in enumerate(deltas)
        ]
        if reason is not None:
            parts.append(ChatChunkChoice(place, Delta(), None, reader.reason(reason)))
        return [self.write_chunk(part) for part in parts]

    def _logprobs(self, choices: Sequence[SampledToken]) -> ChatLogprobs | None:
        if not choices or not self._listed:
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


class CompletionWriter(TokenWriter):
    """Writes texts of ``/v1/completions``. ``echoes`` are the prompts, if the request echoes them."""

    chunk = Completion

    def __init__(
        self,
        body: CompletionRequest,
        provenance: Provenance,
        tokens: TokenTexts,
        prompts: Sequence[Sequence[int]],
        echoes: Sequence[str] = (),
    ) -> None:
        super().__init__("cmpl", body, provenance, tokens, prompts)
        self._echoes = echoes
        self.waits = bool(echoes) and self._listed
        self._offsets: dict[int, int] = {}

    def write_response(self, sequences: Sequence[SequenceOutput], usage: Usage) -> Completion:
        """Returns all texts, or the likeliest where more were drawn than the request wants."""
        drawn = len(sequences) // len(self._prompts)
        rows = [
            row
            for first in range(0, len(sequences), drawn)
            for row in _likeliest(sequences[first : first + drawn], self._draws)
        ]
        choices = [
            CompletionChoice(
                place,
                self._echo(place) + row.text,
                self._logprobs(place, [*(row.scored if self.waits else ()), *row.choices]),
                row.reason,
                self.prompt_logprobs(row),
                self.token_ids(row.choices),
                self.prompt_token_ids(place),
            )
            for place, row in enumerate(rows)
        ]
        return Completion(**self.head, choices=choices, usage=usage, adapterpack=self.provenance)

    def write_start(self, place: int, row: SequenceOutput) -> list[Any]:
        """Returns the prompt, if the request echoes it or wants its tokens."""
        scored = self._logprobs(place, row.scored)
        ids = self.prompt_token_ids(place)
        choice = CompletionChoice(place, self._echo(place), scored, prompt_token_ids=ids)
        return [self.write_chunk(choice)] if self._echoes or self._ids else []

    def write_piece(
        self, place: int, text: str, choices: Sequence[SampledToken], reason: str | None
    ) -> list[Any]:
        """Returns a chunk with new text; the last one has the finish reason and the provenance."""
        if not text and not choices and reason is None:
            return []
        ids = self.token_ids(choices)
        choice = CompletionChoice(place, text, self._logprobs(place, choices), reason, token_ids=ids)
        return [self.write_chunk(choice, UNSET if reason is None else self.provenance)]

    def _echo(self, place: int) -> str:
        return self._echoes[place] if self._echoes else ""

    def _logprobs(self, place: int, choices: Sequence[SampledToken]) -> CompletionLogprobs | None:
        if not choices or not self._listed:
            return None
        result = CompletionLogprobs([], [], [], [])
        for choice in choices:
            text, _ = self._tokens.of(choice.token)
            result.text_offset.append(self._offsets.get(place, 0))
            self._offsets[place] = self._offsets.get(place, 0) + len(text)
            result.tokens.append(text)
            if choice.logprob is None:
                result.token_logprobs.append(None)
                result.top_logprobs.append(None)
                continue
            result.token_logprobs.append(max(choice.logprob, LEAST))
            top: dict[str, float] = {}
            for token, logprob in choice.top_logprobs:
                # several tokens may be parts of a character, with one text: the likeliest comes first
                top.setdefault(self._tokens.of(token)[0], max(logprob, LEAST))
            result.top_logprobs.append(top)
        return result


def _likeliest(rows: Sequence[SequenceOutput], count: int) -> Sequence[SequenceOutput]:
    """Returns the rows whose tokens are the likeliest on average, if there are more than ``count``."""
    if len(rows) == count:
        return rows
    means = [sum(choice.logprob or 0.0 for choice in row.choices) / max(1, len(row.choices)) for row in rows]
    return [rows[place] for place in sorted(range(len(rows)), key=means.__getitem__, reverse=True)[:count]]
