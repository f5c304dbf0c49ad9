"""The requests of an engine, and the events that its steps give of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import AdapterpackError
from ..generation.answer import Answer, Ending
from ..generation.beam_search import BeamAnswer
from ..generation.token_chooser import Choice
from .row_batch import Row


@dataclass(frozen=True)
class Event:
    """What happened to a request in a step.

    Attributes:
        request: the number that :meth:`~.base.Engine.add` gave.
        adapter: the digest of the pack that the row runs with, None for the base.
        token: the id of the row's new token; None where it ended otherwise.
        choice: how it was chosen, with its log-probability if the request asks for it.
        text: the answer so far. It is final: the next one begins with it. A beam search has none before its
            end.
        finish_reason: why the row ended: ``stop``, ``length``, ``cancelled`` or ``error``; None while it goes
            on.
        error: what went wrong, of a row that ended by ``error``.
        result: what the row's one pass says, of a task that makes no text: the keys that ``adapterpack run``
            adds to such a row.
        prompt_tokens: how many tokens were read for that.
        sequences: the best sequences of a beam search that has ended, best first.
    """

    request: int
    adapter: str | None
    token: int | None = None
    choice: Choice | None = None
    text: str = ""
    finish_reason: str | None = None
    error: AdapterpackError | None = None
    result: Mapping[str, Any] | None = None
    prompt_tokens: int | None = None
    sequences: tuple[Ending, ...] = ()


@dataclass(eq=False, kw_only=True)
class Beam(Row):
    """A row of the pool that a request has: the only one, or one of its beams."""

    request: Request = field(init=False)


@dataclass(eq=False, kw_only=True)
class Request(Beam):
    """A row with its number and its answer so far; ``beams`` are all rows that it has, in the order of its
    answer.
    """

    number: int
    answer: Answer | BeamAnswer
    beams: list[Beam] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.request, self.beams = self, [self]

    def another(self) -> Beam:
        """One more row for it."""
        beam = Beam(
            prompt=self.prompt,
            adapter=self.adapter,
            features=self.features,
            source=self.source,
            salt=self.salt,
        )
        beam.request = self
        return beam
