"""How an answer is written: as a message of a conversation, or as text. One class a route, with the same four
parts.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from ...runtime.generation.sampler import Choice
from ...runtime.tools.family import Call
from ...runtime.tools.reader import CallReader, Piece
from ..scheduling.rows import Said
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


class Head:
    """What all objects of one answer begin with."""

    def __init__(self, prefix: str, model: str, provenance: Provenance) -> None:
        self.id, self.created, self.model = f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model
        self.provenance = provenance

    def fields(self) -> dict[str, Any]:
        """Its fields by name."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.provenance.digest,
        }


class Form:
    """Writes the answer of one request. ``usage`` of a chunk is left out, or null until the last one; ``end``
    is the end of a stream.
    """

    head: Head
    end = sse.DONE

    def event(self, value: Any) -> bytes:
        """A chunk as it is sent."""
        return sse.event(value)

    def whole(self, said: Sequence[Said], usage: Usage) -> Any:
        """The answer in one object."""
        raise NotImplementedError

    def opening(self, place: int, usage: UnsetType | None) -> list[Any]:
        """The chunks before a row's first token."""
        raise NotImplementedError

    def piece(
        self, place: int, text: str, choices: Sequence[Choice], reason: str | None, usage: UnsetType | None
    ) -> list[Any]:
        """The chunks for what a row has said since the last one, and for its end."""
        raise NotImplementedError

    def closing(self, usage: Usage, counted: bool) -> list[Any]:
        """The chunks behind the last token; ``counted``: the client wants to know what it all took."""
        return [self.total(usage)] if counted else []

    def total(self, usage: Usage) -> Any:
        """The chunk for who wants to know that."""
        raise NotImplementedError


class Spoken:
    """What one answer has said: ``text``, and calls of tools where ``calls`` makes what reads them."""

    def __init__(self, calls: Callable[[], CallReader] | None) -> None:
        self._reader, self._said = None if calls is None else calls(), ""

    def more(self, text: str, ended: bool) -> list[Piece]:
        """What further text adds to the message."""
        self._said += text
        if self._reader is None:
            return [Piece("text", text)] if text else []
        return self._reader.read(self._said, ended)

    @property
    def text(self) -> str:
        """What is no call."""
        return self._said if self._reader is None else self._reader.text

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


class ChatForm(Form):
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
        self.head, self._tokens, self._calls = Head("chatcmpl", model, provenance), tokens, calls
        self._spoken: dict[int, Spoken] = {}

    def whole(self, said: Sequence[Said], usage: Usage) -> ChatCompletion:
        """See :class:`Form`."""
        choices = []
        for place, row in enumerate(said):
            spoken = Spoken(self._calls)
            spoken.more(row.text, True)
            calls = [ToolCall(call_id(), FunctionCall(*call)) for call in spoken.calls]
            message = AnswerMessage(
                "assistant", None if calls and not spoken.text else spoken.text, None, calls or UNSET
            )
            choices.append(ChatChoice(place, message, self._logprobs(row.choices), spoken.reason(row.reason)))
        return ChatCompletion(
            **self.head.fields(), choices=choices, usage=usage, adapterpack=self.head.provenance
        )

    def opening(self, place: int, usage: UnsetType | None) -> list[Any]:
        """The role of who speaks, and with the first one what answers."""
        return [
            ChatChunk(
                **self.head.fields(),
                choices=[ChatChunkChoice(place, Delta("assistant", ""))],
                usage=usage,
                adapterpack=UNSET if place else self.head.provenance,
            )
        ]

    def piece(
        self, place: int, text: str, choices: Sequence[Choice], reason: str | None, usage: UnsetType | None
    ) -> list[Any]:
        """See :class:`Form`; the reason of the end has a chunk of its own."""
        spoken = self._spoken.setdefault(place, Spoken(self._calls))
        number = len(spoken.calls) - 1
        deltas: list[Delta] = []
        for piece in spoken.more(text, reason is not None):
            number += piece.kind == "name"
            deltas += _delta(piece, number)
        if choices and not deltas:
            deltas.append(Delta(content=""))
        parts = [
            ChatChunkChoice(place, delta, None if after else self._logprobs(choices))
            for after, delta in enumerate(deltas)
        ]
        if reason is not None:
            parts.append(ChatChunkChoice(place, Delta(), None, spoken.reason(reason)))
        return [ChatChunk(**self.head.fields(), choices=[part], usage=usage) for part in parts]

    def total(self, usage: Usage) -> ChatChunk:
        """See :class:`Form`."""
        return ChatChunk(**self.head.fields(), choices=[], usage=usage)

    def _logprobs(self, choices: Sequence[Choice]) -> ChatLogprobs | None:
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


def _delta(piece: Piece, number: int) -> list[Delta]:
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


class CompletionForm(Form):
    """Texts of ``/v1/completions``; ``echoes`` are the prompts, where they come first."""

    def __init__(
        self, model: str, provenance: Provenance, tokens: TokenTexts, echoes: Sequence[str] = ()
    ) -> None:
        self.head, self._tokens, self._echoes = Head("cmpl", model, provenance), tokens, echoes
        self._offsets: dict[int, int] = {}

    def whole(self, said: Sequence[Said], usage: Usage) -> Completion:
        """See :class:`Form`."""
        choices = [
            CompletionChoice(
                place, self._echo(place) + row.text, self._logprobs(place, row.choices), row.reason
            )
            for place, row in enumerate(said)
        ]
        return Completion(
            **self.head.fields(), choices=choices, usage=usage, adapterpack=self.head.provenance
        )

    def opening(self, place: int, usage: UnsetType | None) -> list[Any]:
        """The prompt, where it is wanted."""
        if not self._echoes:
            return []
        return [
            Completion(
                **self.head.fields(), choices=[CompletionChoice(place, self._echo(place))], usage=usage
            )
        ]

    def piece(
        self, place: int, text: str, choices: Sequence[Choice], reason: str | None, usage: UnsetType | None
    ) -> list[Any]:
        """See :class:`Form`; the reason of the end comes with the last text, and says what answered."""
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

    def total(self, usage: Usage) -> Completion:
        """See :class:`Form`."""
        return Completion(**self.head.fields(), choices=[], usage=usage)

    def _echo(self, place: int) -> str:
        return self._echoes[place] if self._echoes else ""

    def _logprobs(self, place: int, choices: Sequence[Choice]) -> CompletionLogprobs | None:
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
