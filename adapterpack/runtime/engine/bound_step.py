"""One pass of the engine's graph on rows of the pool: bound once, then run again and again on the numbers
that are written into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...bundle.decoder_graph import CACHE_LENGTHS, LAST_POSITIONS, LOGITS_POSITIONS, LONGEST, SOURCE_LENGTHS
from ...bundle.manifest import ADAPTER_POSITIONS, PAST, PRESENT
from ..ort.model import TYPES, OrtModel
from ..ort.values import HOST, array_of, element_type, empty, fill, value_of
from .adapter_feeds import Feeds
from .kv_pool import KVPool
from .sources import Sources


class BoundStep:
    """Passes over ``tokens`` tokens of each of ``rows`` consecutive rows of the pool, from ``first``, with
    these adapters' ``feeds``.

    ``kept`` logits are given of each row; ``sources`` are what an encoder made of the rows, and ``features``
    other inputs of the graph. A pass that has a number, ``capture``, is recorded by the provider when it
    first runs and replayed from then on: its memory is its own, and :meth:`feed` puts other values into it.
    """

    def __init__(
        self,
        graph: OrtModel,
        pool: KVPool,
        first: int,
        rows: int,
        feeds: Feeds,
        sources: Sources,
        *,
        tokens: int = 1,
        kept: int = 1,
        features: Mapping[str, np.ndarray] | None = None,
        capture: int | None = None,
    ) -> None:
        self.graph, self._binding, self._capture = graph, graph.binding(), capture
        self._alive: list[Any] = [feeds, pool, sources]
        self._inputs: list[tuple[np.ndarray, Any]] = []
        self.ids = self._input("input_ids", (rows, tokens))
        self.positions = self._input("position_ids", (rows, tokens))
        self.last = self._input(CACHE_LENGTHS, (rows,))
        self.longest = self._input(LONGEST, ())
        self.ends = self._input(LAST_POSITIONS, (rows, 1))
        self.kept = self._input(LOGITS_POSITIONS, (rows, kept))
        self.read = self._input(SOURCE_LENGTHS, (rows,))
        self.acting = self._input(ADAPTER_POSITIONS, (rows, tokens))
        self._feeds = (
            feeds
            if capture is None
            else {name: value_of(array_of(value).copy(), graph.memory) for name, value in feeds.items()}
        )
        given = {name: value_of(array, graph.memory) for name, array in (features or {}).items()}
        for name, value in {**self._feeds, **given}.items():
            self._alive.append(value)
            self._binding.bind_ortvalue_input(name, value)
        for name, window in pool.windows(first, rows):
            place = (*pool.memory, element_type(pool.dtype(name)), window.shape, window.address)
            self._binding.bind_input(name, *place)
            self._binding.bind_output(PRESENT + name.removeprefix(PAST), *place)
        for name, dtype, window in sources.windows(first, rows):
            self._binding.bind_input(name, *pool.memory, element_type(dtype), window.shape, window.address)
        logits = graph.results["logits"]
        shape, dtype = (rows, kept, int(logits.shape[2])), np.dtype(TYPES[logits.type])
        self._near = np.empty(shape, dtype) if graph.memory == HOST else None
        self._logits = empty(shape, dtype, graph.memory) if self._near is None else value_of(self._near)
        self._binding.bind_ortvalue_output("logits", self._logits)

    def feed(self, feeds: Feeds) -> None:
        """Puts other adapters' values, of the same shapes, into the memory of a captured pass."""
        for name, value in self._feeds.items():
            fill(value, array_of(feeds[name]))

    def run(self) -> np.ndarray:
        """The logits ``[rows, kept, vocabulary]`` of the pass on what was written into its inputs; the next
        run writes over them.
        """
        for array, value in self._inputs:
            fill(value, array)
        self.graph.run_bound(self._binding, self._capture)
        return array_of(self._logits) if self._near is None else self._near

    def _input(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The memory of an input, zeros at first; of one that the graph does not have, memory that nothing
        reads.
        """
        value = self.graph.inputs.get(name)
        array = np.zeros(shape, TYPES[value.type] if value is not None else np.int64)
        if value is not None:
            # the longest row's length is read by the host
            memory = HOST if name == LONGEST else self.graph.memory
            bound = value_of(array, memory)
            self._binding.bind_ortvalue_input(name, bound)
            if memory != HOST:
                self._inputs.append((array, bound))
            self._alive.append(bound)
        return array
