"""The KV cache of all running rows, in fixed memory; a row is an index."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...bundle.manifest import PAST
from ..ort.model import TYPES, OrtModel
from .kv_buffers import buffer


class Window(NamedTuple):
    """Consecutive rows of one buffer: the address of their first number, and their shape ``[rows, heads,
    length, head_dim]``.
    """

    address: int
    shape: tuple[int, ...]


class KVPool:
    """A buffer ``[rows, heads, length, head_dim]`` for the keys and one for the values of each layer,
    allocated once. ``family`` is the prefix of the graph inputs that they feed.

    Rows occupy the beginning of the buffers without gaps, so the graph can read and write any range of rows
    in place. On the CPU the system provides memory when a position is first written.

    Raises:
        ConfigError: the memory is too small for so many rows of so many positions.
    """

    def __init__(self, graph: OrtModel, rows: int, length: int, family: str = PAST) -> None:
        self.rows, self.length, self.memory = rows, length, graph.memory
        self._buffers = {
            name: buffer(
                (rows, value.shape[1], length, value.shape[3]), np.dtype(TYPES[value.type]), graph.resolved
            )
            for name, value in graph.inputs.items()
            if name.startswith(family)
        }

    @property
    def nbytes(self) -> int:
        """The size of all buffers in bytes."""
        return sum(math.prod(one.shape) * one.dtype.itemsize for one in self._buffers.values())

    def dtype(self, name: str) -> np.dtype[Any]:
        """Returns the dtype of a buffer."""
        return self._buffers[name].dtype

    def windows(self, first: int, rows: int) -> Iterator[tuple[str, Window]]:
        """Yields the memory of ``rows`` rows from ``first`` on, with the graph input that it feeds."""
        for name, one in self._buffers.items():
            yield (
                name,
                Window(
                    one.address + first * math.prod(one.shape[1:]) * one.dtype.itemsize,
                    (rows, *one.shape[1:]),
                ),
            )

    def write(self, row: int, arrays: Sequence[np.ndarray], start: int = 0) -> None:
        """Writes keys and values ``[heads, positions, head_dim]`` into a row from the position ``start`` on;
        one array for each buffer, in their order.
        """
        for one, array in zip(self._buffers.values(), arrays, strict=True):
            one.write(row, array, start)

    def read(self, row: int, start: int, stop: int) -> list[np.ndarray]:
        """Returns copies of the positions ``start`` to ``stop`` of a row, one for each buffer."""
        return [one.read(row, start, stop) for one in self._buffers.values()]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` positions of a row to another row."""
        for one in self._buffers.values():
            one.move(source, target, length)
