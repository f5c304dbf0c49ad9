"""The requests of an engine, and the events that its steps return."""

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
        token: the id of the row's new token; None if the step ended the row without one.
        choice: how it was chosen, with its log-probability if the request asks for it.
        text: the answer so far. Later events only extend it. A beam search has none before its end.
        finish_reason: why the row ended: ``stop``, ``length``, ``cancelled`` or ``error``; None while it
            runs.
        error: the error of a row that ended by ``error``.
        result: for a task that makes no text, the result of the row's pass: the keys that ``adapterpack run``
            adds to such a row.
        prompt_tokens: the number of tokens that were read for the result.
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
    """A request: its number, its answer so far, and the sequences that the engine runs for it, in the order
    of the answer.
    """

    number: int
    answer: Answer | BeamAnswer
    sequences: list[SequenceState]

    def __post_init__(self) -> None:
        self.sequences[0].request = self

    @property
    def adapter(self) -> ResidentAdapter | None:
        """The adapter with which its sequences run."""
        return self.sequences[0].adapter

    @property
    def digest(self) -> str | None:
        """The digest of its adapter."""
        return None if self.adapter is None else self.adapter.digest
