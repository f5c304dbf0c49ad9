"""Answers a batch of prompts with an engine that the session keeps for its next call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

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
    """The engine of a session: made on first use, and replaced by a larger one when a call needs more or
    longer rows.
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


def room_for(session: OpenBundle, positions: int, virtual: int, new: int) -> int:
    """Returns the positions that a row of the pool needs for an adapter's prompt, a prompt and ``new``
    tokens, within the model's context.
    """
    length = -(-(positions + virtual + new) // _STEP) * _STEP
    return min(length, context_of(session) or max(_UNBOUNDED, positions + virtual))


def virtual_tokens(session: OpenBundle, pack: Pack | Mix | None) -> int:
    """Returns how many positions a pack's prompt takes in a row's cache."""
    return 0 if pack is None or (prompt := session.prompt(pack)) is None else int(prompt.shape[3])


class SessionEngine:
    """Runs the calls of a session on its engine, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._engine = GrowingEngine()
        self._running = False

    def run(
        self,
        session: OpenBundle,
        prompts: Sequence[Sequence[int]],
        packs: Sequence[Pack | Mix | None],
        sampling: Sampling,
        emit: Callable[[int, int, str], None] | None,
        features: Sequence[Mapping[str, np.ndarray]],
    ) -> list[Request]:
        """Runs the prompts and returns their requests once all have ended. ``features`` are the other inputs
        of each row. A call from within ``emit`` gets an engine of its own.

        Raises:
            RowError: the model has no positions for a prompt.
            AdapterpackError: a row failed while it ran.
        """
        with self._lock:
            if self._running:
                return SessionEngine().run(session, prompts, packs, sampling, emit, features)
            self._running = True
            try:
                return self._run(
                    self._for(session, prompts, packs, sampling),
                    session,
                    prompts,
                    packs,
                    sampling,
                    emit,
                    features,
                )
            finally:
                self._running = False

    def _run(
        self,
        engine: DecoderEngine,
        session: OpenBundle,
        prompts: Sequence[Sequence[int]],
        packs: Sequence[Pack | Mix | None],
        sampling: Sampling,
        emit: Callable[[int, int, str], None] | None,
        features: Sequence[Mapping[str, np.ndarray]],
    ) -> list[Request]:
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
            self._empty(engine, rows)
        return rows

    def _for(
        self,
        session: OpenBundle,
        prompts: Sequence[Sequence[int]],
        packs: Sequence[Pack | Mix | None],
        sampling: Sampling,
    ) -> DecoderEngine:
        count = max(min(len(prompts) * sampling.num_beams, _MOST_ROWS), sampling.num_beams)
        virtual = max(virtual_tokens(session, pack) for pack in packs)
        longest = len(start_ids(session)) if session.task.has_encoder else max(map(len, prompts))
        return self._engine.of(session, count, room_for(session, longest, virtual, sampling.max_new_tokens))

    @staticmethod
    def _empty(engine: DecoderEngine, rows: Sequence[Request]) -> None:
        """Cancels the remaining rows of a batch that an error ended."""
        if engine.busy:
            for row in rows:
                engine.cancel(row.number)
            with suppress(AdapterpackError):
                engine.step()
