"""The states of fixed size that convolutions and recurrences keep for each row, in fixed memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ...bundle import replaced_states
from ...errors import AdapterpackError
from ..ort import TYPES, OrtModel, element_type
from .kv_pool import Window, buffer


class RowStates:
    """The states of up to ``rows`` rows, at the same indices as the rows in the KV pool; empty for a graph
    without states.

    Each row has its states twice: as its last pass read them, and as that pass left them. A pass that fails
    therefore changes nothing, and a row can take its last pass back.
    """

    def __init__(self, graph: OrtModel, rows: int) -> None:
        self._rows, self._memory = rows, graph.memory
        self._shapes = {name: tuple(graph.inputs[name].shape[1:]) for name in replaced_states(graph.inputs)}
        self._buffers = {
            name: buffer(
                (2 * rows, 1, 1, math.prod(shape)), np.dtype(TYPES[graph.inputs[name].type]), graph.resolved
            )
            for name, shape in self._shapes.items()
        }

    def __len__(self) -> int:
        return len(self._buffers)

    def windows(self, first: int, rows: int) -> Iterator[tuple[str, Window, Window]]:
        """Yields for each state the memory that a pass over ``rows`` rows from ``first`` on reads, and the
        memory that it writes, with the graph input.
        """
        for name, one in self._buffers.items():
            nbytes = one.shape[3] * one.dtype.itemsize
            read, written = (
                (
                    *self._memory,
                    element_type(one.dtype),
                    (rows, *self._shapes[name]),
                    one.address + at * nbytes,
                )
                for at in (self._rows + first, first)
            )
            yield name, read, written

    def clear(self, row: int) -> None:
        """Sets the states of a row to zeros, as they are before its first token."""
        self.write(row, [np.zeros(one.shape[1:], one.dtype) for one in self._buffers.values()])

    def write(self, row: int, arrays: Sequence[np.ndarray]) -> None:
        """Sets the states of a row to those that :meth:`read` returned."""
        for one, array in zip(self._buffers.values(), arrays, strict=True):
            one.write(row, array, 0)

    def read(self, row: int) -> list[np.ndarray]:
        """Returns copies of the states of a row."""
        return [one.read(row, 0, 1) for one in self._buffers.values()]

    def move(self, source: int, target: int) -> None:
        """Copies the states of a row to another row, and those before its last pass."""
        for one in self._buffers.values():
            one.move(source, target, 1)
            one.move(self._rows + source, self._rows + target, 1)

    @contextmanager
    def passing(self, first: int, rows: int) -> Iterator[None]:
        """Gives the states of ``rows`` rows from ``first`` on to a pass, which replaces them unless it
        fails.
        """
        for one in self._buffers.values():
            one.move(first, self._rows + first, 1, rows)
        try:
            yield
        except AdapterpackError:
            self.take_back(first, rows)
            raise

    def take_back(self, first: int, rows: int = 1) -> None:
        """Returns rows to their states before their last pass."""
        for one in self._buffers.values():
            one.move(self._rows + first, first, 1, rows)
