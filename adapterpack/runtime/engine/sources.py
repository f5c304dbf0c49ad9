"""The encoder's output for the rows of the pool: the keys and values for cross-attention, computed once for
each row.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ...adapter_methods import PROMPT, Tensors
from ...bundle import ADAPTER_IDS, ADAPTER_POSITIONS, ENCODED, SOURCE_LENGTHS
from ...errors import ConfigError
from ...slots import virtual_room
from ...tasks import Arrays
from ..open_bundle import OpenBundle
from ..ort import OrtModel, array_of, value_of
from ..text import require_context
from .kv_pool import KVPool, Window
from .requests import SequenceState

_STEP = 64
"""The memory of all rows grows by this many positions. It stays small, because cross-attention covers the
longest row's length in every row.
"""


def source_of(bundle: OpenBundle, ids: list[int], given: Tensors) -> Arrays:
    """Returns the encoder inputs of one row: token ids, or the arrays ``given`` in their place, such as
    ``input_features``.

    Raises:
        ConfigError: the encoder does not take them.
        RowError: the model has no positions for them.
    """
    arrays = dict(given) if given else {"input_ids": np.array([ids], np.int64)}
    graph = bundle.graph(bundle.task.parts[0].name)
    for name, array in arrays.items():
        wanted = list(graph.inputs[name].shape) if name in graph.inputs else None
        if (
            wanted is None
            or len(array) != 1
            or len(array.shape) != len(wanted)
            or 0 in array.shape
            or any(
                isinstance(one, int) and one != two
                for one, two in zip(wanted[1:], array.shape[1:], strict=True)
            )
        ):
            raise ConfigError(
                "an encoder does not take this input",
                where=name,
                found=array.shape,
                expected=wanted or ", ".join(graph.inputs),
            )
    if bundle.task.parts[0].inputs[0] not in arrays:
        raise ConfigError(
            "inputs are missing", expected=bundle.task.parts[0].inputs[0], found=", ".join(arrays)
        )
    if "input_ids" in arrays:
        room = virtual_room(bundle.bundle.sites)
        require_context(bundle, np.array([arrays["input_ids"].shape[1] + room]), room)
    return arrays


class Sources:
    """The encoder's keys and values of up to ``rows`` rows, at the same indices as the rows in the KV pool.
    Empty for a bundle without an encoder.

    The memory is as long as the longest row, and is freed when no row is left.
    """

    def __init__(self, bundle: OpenBundle, decoder: OrtModel, rows: int) -> None:
        self.bundle, self._decoder, self._rows = bundle, decoder, rows
        self._ragged = SOURCE_LENGTHS in decoder.inputs
        self._pool: KVPool | None = None

    def read(self, row: SequenceState, place: int) -> bool:
        """Runs the encoder on a row and stores its keys and values at ``place``. Returns whether the memory
        was reallocated, which invalidates bound passes.
        """
        outputs = self._encode(row)
        arrays = [outputs[name][0] for name in self._decoder.inputs if name.startswith(ENCODED)]
        # The virtual tokens that the adapter puts before the row's own take a part of the room for them.
        here = None if row.adapter is None else row.adapter.source.get(f"{PROMPT}.virtual_here")
        unused = virtual_room(self.bundle.bundle.sites) - (0 if here is None else int(here[0].sum()))
        length = int(arrays[0].shape[1]) - unused
        row.source_length, arrays = length, [array[:, :length] for array in arrays]
        if self._pool is not None and not self._ragged and self._pool.length != length:
            raise ConfigError(
                "what the encoder reads is of one length for all rows",
                found=f"{length} positions",
                expected=self._pool.length,
            )
        moved = self._pool is None or self._pool.length < length
        if moved:
            self._grow(length, place)
        assert self._pool is not None
        self._pool.write(place, arrays)
        return moved

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the keys and values of a row to another place."""
        if self._pool is not None and length:
            self._pool.move(source, target, length)

    def windows(self, first: int, rows: int) -> Iterable[tuple[str, Window]]:
        """Returns the memory of ``rows`` rows from ``first`` on, with the graph input that it feeds."""
        return () if self._pool is None else self._pool.windows(first, rows)

    def forget(self) -> None:
        """Frees the memory."""
        self._pool = None

    def _grow(self, length: int, rows: int) -> None:
        # Only a ragged graph masks the end of shorter rows, so only there may the memory be longer than the
        # rows.
        room = -(-length // _STEP) * _STEP if self._ragged else length
        old, new = self._pool, KVPool(self._decoder, self._rows, room, ENCODED)
        for place in range(rows if old is not None else 0):
            new.write(place, old.read(place, 0, old.length))  # type: ignore[union-attr]
        self._pool = new

    def _encode(self, row: SequenceState) -> Arrays:
        part = self.bundle.task.parts[0].name
        graph, feeds = self.bundle.graph(part), dict(row.source)
        ids = feeds.get("input_ids")
        if "attention_mask" in graph.inputs and ids is not None:
            feeds.setdefault("attention_mask", np.ones_like(ids))
        if ADAPTER_POSITIONS in graph.inputs and ids is not None:
            acting = row.acting_at(ids[0])
            feeds[ADAPTER_POSITIONS] = np.ones(ids.shape, bool) if acting is None else acting[None]
        if ADAPTER_IDS in graph.inputs:
            feeds[ADAPTER_IDS] = np.zeros(1, np.int64)
        values = {
            name: value_of(np.ascontiguousarray(graph.cast(name, array))) for name, array in feeds.items()
        }
        slots = {} if row.adapter is None else row.adapter.source_feeds(graph.memory)
        return {name: array_of(value) for name, value in graph.call({**values, **slots}).items()}
