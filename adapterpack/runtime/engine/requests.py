"""The requests of an engine, and the events that its steps give of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import AdapterpackError
from ..generation.answer import Answer, Ending
from ..generation.beam_search import BeamAnswer
from ..generation.sampler import SampledToken
from .adapter_feeds import ResidentAdapter
from .model_runner import SequenceState


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
    choice: SampledToken | None = None
    text: str = ""
    finish_reason: str | None = None
    error: AdapterpackError | None = None
    result: Mapping[str, Any] | None = None
    prompt_tokens: int | None = None
    sequences: tuple[Ending, ...] = ()


@dataclass(eq=False)
class Request:
    """A request with its number, its answer so far, and the sequences that the engine runs for it, in the
    order of the answer.
    """

    number: int
    answer: Answer | BeamAnswer
    sequences: list[SequenceState]

    def __post_init__(self) -> None:
        self.sequences[0].request = self

    @property
    def adapter(self) -> ResidentAdapter | None:
        """The adapter that its sequences run with."""
        return self.sequences[0].adapter

    @property
    def digest(self) -> str | None:
        """The digest of its adapter."""
        return None if self.adapter is None else self.adapter.digest
