"""One pass of the engine's graph on rows of the pool: bound once, then run again and again on the numbers that are written into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from ...bundle.decoder_graph import CACHE_LENGTHS, LOGITS_POSITIONS, LONGEST, SOURCE_LENGTHS
from ...bundle.manifest import ADAPTER_POSITIONS, PAST, PRESENT
from ..ort_model import TYPES, OrtModel
from .adapter_feeds import Feeds
from .kv_pool import KVPool
from .sources import Sources


class BoundPass:
    """Passes over ``tokens`` tokens of each of ``rows`` consecutive rows of the pool, from ``first``, with these adapters' ``feeds``.

    ``kept`` logits are given of each row; ``sources`` are what an encoder made of the rows, and ``features`` other inputs of the graph.
    """

    def __init__(self, graph: OrtModel, pool: KVPool, first: int, rows: int, feeds: Feeds, sources: Sources, *, tokens: int = 1,
                 kept: int = 1, features: Mapping[str, np.ndarray] | None = None) -> None:
        self.graph, self._binding = graph, graph.binding()
        self._alive: list[Any] = [feeds]
        self._inputs: dict[str, tuple[np.ndarray, Any]] = {}
        self.ids = self._input("input_ids", (rows, tokens))
        self.positions = self._input("position_ids", (rows, tokens))
        self.last = self._input(CACHE_LENGTHS, (rows,))
        self.longest = self._input(LONGEST, ())
        self.kept = self._input(LOGITS_POSITIONS, (rows, kept))
        self.read = self._input(SOURCE_LENGTHS, (rows,))
        self.acting = self._input(ADAPTER_POSITIONS, (rows, tokens))
        for name, value in feeds.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, array in (features or {}).items():
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *graph.memory)
            self._alive.append(value)
            self._binding.bind_ortvalue_input(name, value)
        for name, window in pool.windows(first, rows):
            place = (*pool.memory, pool.dtype(name), window.shape, window.address)
            self._binding.bind_input(name, *place)
            self._binding.bind_output(PRESENT + name.removeprefix(PAST), *place)
        for name, dtype, window in sources.windows(first, rows):
            self._binding.bind_input(name, *pool.memory, dtype, window.shape, window.address)
        self._alive += [pool, sources]
        logits = graph.results["logits"]
        self._logits = np.empty((rows, kept, int(logits.shape[2])), TYPES[logits.type])
        value = ort.OrtValue.ortvalue_from_numpy(self._logits)
        self._alive.append(value)
        self._binding.bind_ortvalue_output("logits", value)

    def run(self) -> np.ndarray:
        """The logits ``[rows, kept, vocabulary]`` of the pass on what was written into its inputs; the next run writes over them."""
        for array, value in self._inputs.values():
            if value is not None:
                value.update_inplace(array)
        self.graph.run_bound(self._binding)
        return self._logits

    def _input(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The memory of an input, zeros at first; of one that the graph does not have, memory that nothing reads."""
        value = self.graph.inputs.get(name)
        array = np.zeros(shape, TYPES[value.type] if value is not None else np.int64)
        if value is not None:
            near = name == LONGEST or self.graph.memory[0] == "cpu"  # the longest row's length is read by the host
            bound = ort.OrtValue.ortvalue_from_numpy(array, *(("cpu", 0) if near else self.graph.memory))
            self._binding.bind_ortvalue_input(name, bound)
            self._inputs[name] = array, None if near else bound
            self._alive.append(bound)
        return array
