"""One pass of the engine's graph on rows of the KV pool, with its inputs and outputs bound once and reused
for many runs.

Binding costs time in every step, so a decode loop binds once and writes token ids, positions and lengths into
the bound arrays.
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
    """A pass over ``tokens`` tokens of each of ``rows`` consecutive rows of the pool, from row ``first`` on,
    with the adapters' ``feeds``.

    The graph returns ``kept`` logits of each row. ``sources`` holds the encoder's keys and values, and
    ``features`` other inputs of the graph. With a number in ``capture``, the provider records the first run
    (as a CUDA graph) and replays it afterwards; the pass then owns its memory, and :meth:`feed` changes its
    values.
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
        # Input and output caches are the same memory: the graph appends keys and values in place.
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
        """Copies the values of other adapters, of the same shapes, into the memory of a captured pass."""
        for name, value in self._feeds.items():
            fill(value, array_of(feeds[name]))

    def run(self) -> np.ndarray:
        """Runs the pass on the numbers that were written into its inputs and returns the logits ``[rows,
        kept, vocabulary]``. The next run overwrites them.
        """
        for array, value in self._inputs:
            fill(value, array)
        self.graph.run_bound(self._binding, self._capture)
        return array_of(self._logits) if self._near is None else self._near

    def _input(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Binds an array of zeros to an input and returns the array. If the graph lacks the input, nothing
        reads the array.
        """
        value = self.graph.inputs.get(name)
        array = np.zeros(shape, TYPES[value.type] if value is not None else np.int64)
        if value is not None:
            # kernels read this length on the host
            memory = HOST if name == LONGEST else self.graph.memory
            bound = value_of(array, memory)
            self._binding.bind_ortvalue_input(name, bound)
            if memory != HOST:
                self._inputs.append((array, bound))
            self._alive.append(bound)
        return array
