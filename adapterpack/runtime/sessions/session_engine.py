"""The decoder engine that a session keeps between calls, and a batch of prompts answered on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from ...errors import AdapterpackError
from ...pack.pack import Pack
from ...tasks.data.rows import RowError, row_errors
from ..adapters.mix import Mix
from ..engine.engine import DecoderEngine
from ..engine.requests import Request
from ..generation.sampling import Sampling
from ..generation.structured import grammar_mask
from ..open_bundle import OpenBundle
from ..prompts import start_ids
from ..text.context_length import context_of

_MOST_ROWS = 64
"""The most rows of a batch that run at once; the others wait."""
_UNBOUNDED = 1 << 14
"""The most positions of a row, for models with an unbounded context."""
_STEP = 256
"""The length of the pool's rows is a multiple of this many positions, so that the engine is rarely
replaced.
"""


class GrowingEngine:
    """An engine that is made on first use, and replaced by a larger one when a call needs more or longer
    rows.
    """

    def __init__(self, prefix_budget: int = 0) -> None:
        self._prefix_budget = prefix_budget
        self.engine: DecoderEngine | None = None

    def of(self, session: OpenBundle, rows: int, length: int) -> DecoderEngine:
        """Returns an engine with at least so many rows of so many positions. No row may be running."""
        engine = self.engine
        if engine is None or engine.max_rows < rows or engine.max_length < length:
            self.engine = None  # frees its memory before the new pool is allocated
            if engine is not None:
                rows, length = max(rows, engine.max_rows), max(length, engine.max_length)
            engine = self.engine = DecoderEngine(
                session,
                max_rows=rows,
                max_length=length,
                prompts_together=True,
                prefix_budget=self._prefix_budget,
            )
        return engine


class SessionEngine:
    """The engine of a session, which its calls take one at a time."""

    def __init__(self) -> None:
        self._lock, self._engine, self._taken = threading.RLock(), GrowingEngine(), False

    @contextmanager
    def take(self) -> Iterator[GrowingEngine]:
        """Yields the engine to one call. A call from within another's ``emit`` gets an engine of its own."""
        with self._lock:
            inner, self._taken = self._taken, True
            try:
                yield GrowingEngine() if inner else self._engine
            finally:
                self._taken = inner


def length_for(session: OpenBundle, positions: int, new: int) -> int:
    """Returns the length that a row of the pool needs for so many positions and ``new`` tokens after them,
    within the model's context.
    """
    length = -(-(positions + new) // _STEP) * _STEP
    return min(length, context_of(session) or max(_UNBOUNDED, positions))


def positions_of(session: OpenBundle, ids: Sequence[int], pack: Pack | Mix | None) -> int:
    """Returns how many positions of a row's cache a prompt takes, with the prompt of its adapter."""
    read = len(start_ids(session)) if session.task.has_encoder else len(ids)
    return read + virtual_tokens(session, pack)


def virtual_tokens(session: OpenBundle, pack: Pack | Mix | None) -> int:
    """Returns how many positions a pack's prompt takes in a row's cache."""
    return 0 if pack is None or (prompt := session.prompt(pack)) is None else int(prompt.shape[3])


def run_batch(
    engines: GrowingEngine,
    session: OpenBundle,
    prompts: Sequence[Sequence[int]],
    packs: Sequence[Pack | Mix | None],
    features: Sequence[Mapping[str, np.ndarray]],
    sampling: Sampling,
    emit: Callable[[int, int, str], None] | None,
) -> list[Request]:
    """Runs prompts on the engine and returns their requests once all have ended. ``features`` are the other
    inputs of each row.

    Raises:
        RowError: the model has no positions for a prompt.
        AdapterpackError: a row failed while it ran.
    """
    beams = sampling.num_beams
    longest = max(positions_of(session, ids, pack) for ids, pack in zip(prompts, packs, strict=True))
    engine = engines.of(
        session,
        max(min(len(prompts) * beams, _MOST_ROWS), beams),
        length_for(session, longest, sampling.max_new_tokens),
    )
    rows: list[Request] = []
    mask = grammar_mask(session.tokenizer_of(sampling), sampling)
    try:
        for number, (ids, pack, extra) in enumerate(zip(prompts, packs, features, strict=True)):
            try:
                rows.append(engine.row(ids, pack, sampling, extra, number, mask and mask.copy()))
            except RowError as error:
                raise error.moved(number + 1) from error
    except BaseException:
        for row in rows:
            engine.discard(row)
        raise
    places = {row.number: place for place, row in enumerate(rows)}
    for row in rows:
        engine.submit(row)
    try:
        while engine.busy:
            # In the order of the rows, so that callbacks come in the same order every time.
            for event in sorted(engine.step(), key=lambda event: places[event.request]):
                if event.error is not None:
                    with row_errors(places[event.request] + 1):
                        raise event.error
                if emit is not None and event.token is not None:
                    emit(places[event.request], event.token, event.text)
    finally:
        if engine.busy:  # an error ended the batch
            for row in rows:
                engine.cancel(row.number)
            with suppress(AdapterpackError):
                engine.step()
    return rows
