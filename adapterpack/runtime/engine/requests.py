"""What is asked of the engine, and what it tells of every row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import AdapterpackError
from ..generation.sampling import Sampling
from ..text.text_stream import TextStream
from .row_batch import Row


@dataclass(frozen=True)
class Event:
    """What happened to a request in a step.

    Attributes:
        request: the number that :meth:`~.engine.Engine.add` gave.
        adapter: the digest of the pack that the row runs with, None for the base.
        token: the id of the row's new token; None where it ended otherwise.
        text: the answer so far. It is final: the next one begins with it.
        finish_reason: why the row ended: ``stop``, ``length``, ``cancelled`` or ``error``; None while it goes on.
        error: what went wrong, of a row that ended by ``error``.
    """

    request: int
    adapter: str | None
    token: int | None = None
    text: str = ""
    finish_reason: str | None = None
    error: AdapterpackError | None = None


@dataclass(eq=False, kw_only=True)
class Request(Row):
    """A row with what the engine knows of it: ``room`` is how many tokens its answer may have, ``reason`` why it has ended."""

    number: int
    sampling: Sampling
    room: int
    stream: TextStream
    draws: np.random.Generator
    reason: str | None = None
