"""How an answer is written: as a message of a conversation, or as text. One class a route, with the same four parts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from msgspec import UNSET, UnsetType

from ...runtime.generation.token_chooser import Choice
from ..scheduling.rows import Said
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
    Provenance,
    TokenLogprob,
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
        return {"id": self.id, "created": self.created, "model": self.model, "system_fingerprint": self.provenance.digest}


class Form(Protocol):
    """Writes the answer of one request. ``usage`` of a chunk is left out, or null until the last one."""

    head: Head

    def whole(self, said: Sequence[Said], usage: Usage) -> Any:
        """The answer in one object."""

    def opening(self, place: int, usage: UnsetType | None) -> Any:
        """The chunk before a row's first token, or None."""

    def piece(self, place: int, text: str, choices: Sequence[Choice], reason: str | None, usage: UnsetType | None) -> list[Any]:
        """The chunks for what a row has said since the last one, and for its end."""

    def total(self, usage: Usage) -> Any:
        """The last chunk, for who wants to know what it all took."""


class ChatForm:
    """Messages of ``/v1/chat/completions``."""

    def __init__(self, model: str, provenance: Provenance, tokens: TokenTexts) -> None:
        self.head, self._tokens = Head("chatcmpl", model, provenance), tokens

    def whole(self, said: Sequence[Said], usage: Usage) -> ChatCompletion:
        """See :class:`Form`."""
        choices = [ChatChoice(place, AnswerMessage("assistant", row.text), self._logprobs(row.choices), row.reason)
                   for place, row in enumerate(said)]
        return ChatCompletion(**self.head.fields(), choices=choices, usage=usage, adapterpack=self.head.provenance)

    def opening(self, place: int, usage: UnsetType | None) -> ChatChunk:
        """The role of who speaks, and with the first one what answers."""
        return ChatChunk(**self.head.fields(), choices=[ChatChunkChoice(place, Delta("assistant", ""))], usage=usage,
                         adapterpack=UNSET if place else self.head.provenance)

    def piece(self, place: int, text: str, choices: Sequence[Choice], reason: str | None, usage: UnsetType | None) -> list[ChatChunk]:
        """See :class:`Form`; the reason of the end has a chunk of its own."""
        parts = [ChatChunkChoice(place, Delta(content=text), self._logprobs(choices))] if text or choices else []
        if reason is not None:
            parts.append(ChatChunkChoice(place, Delta(), None, reason))
        return [ChatChunk(**self.head.fields(), choices=[part], usage=usage) for part in parts]

    def total(self, usage: Usage) -> ChatChunk:
        """See :class:`Form`."""
        return ChatChunk(**self.head.fields(), choices=[], usage=usage)

    def _logprobs(self, choices: Sequence[Choice]) -> ChatLogprobs | None:
        if not choices:
            return None
        return ChatLogprobs([TokenLogprob(**self._token(choice.token, choice.logprob or 0.0), top_logprobs=[
            TopLogprob(**self._token(token, logprob)) for token, logprob in choice.top_logprobs]) for choice in choices])

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self._tokens.of(token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(data)}


class CompletionForm:
    """Texts of ``/v1/completions``; ``echoes`` are the prompts, where they come first."""

    def __init__(self, model: str, provenance: Provenance, tokens: TokenTexts, echoes: Sequence[str] = ()) -> None:
        self.head, self._tokens, self._echoes = Head("cmpl", model, provenance), tokens, echoes
        self._offsets: dict[int, int] = {}

    def whole(self, said: Sequence[Said], usage: Usage) -> Completion:
        """See :class:`Form`."""
        choices = [CompletionChoice(place, self._echo(place) + row.text, self._logprobs(place, row.choices), row.reason)
                   for place, row in enumerate(said)]
        return Completion(**self.head.fields(), choices=choices, usage=usage, adapterpack=self.head.provenance)

    def opening(self, place: int, usage: UnsetType | None) -> Completion | None:
        """The prompt, where it is wanted."""
        if not self._echoes:
            return None
        return Completion(**self.head.fields(), choices=[CompletionChoice(place, self._echo(place))], usage=usage)

    def piece(self, place: int, text: str, choices: Sequence[Choice], reason: str | None, usage: UnsetType | None) -> list[Completion]:
        """See :class:`Form`; the reason of the end comes with the last text, and says what answered."""
        if not text and not choices and reason is None:
            return []
        choice = CompletionChoice(place, text, self._logprobs(place, choices), reason)
        return [Completion(**self.head.fields(), choices=[choice], usage=usage,
                           adapterpack=UNSET if reason is None else self.head.provenance)]

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
            result.top_logprobs.append({self._tokens.of(token)[0]: max(logprob, LEAST) for token, logprob in choice.top_logprobs})
        return result
