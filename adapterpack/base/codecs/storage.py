"""Defines how a merge reads blocks of a weight as the base stores it, and writes them as the output does.

Reader and writer are independent: a quantized weight written in bfloat16 has the reader of its quantized
format and a plain writer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from ...io import Scratch
from .. import Round

MAIN_PART = "codes"
"""The role that every format has: the part whose tensor represents the weight."""
Read = Callable[[slice, int, Scratch], np.ndarray]
"""Returns stored rows in raw form, from a slice and the elements per row, in a buffer that is valid until the
next call.
"""


class PartUpdate(NamedTuple):
    """New values for ``rows`` of a part, or for ``columns`` of these rows. In a part that is a run of bytes,
    a row is a byte.
    """

    part: str
    rows: slice
    values: np.ndarray
    columns: slice | None = None


class EncodedRows(NamedTuple):
    """A block as it is stored.

    ``updates`` are written to the parts. ``raw`` is what the writer's ``reread`` decodes, ``exact`` means
    that nothing was rounded, and ``noise`` is the expected squared error of the grid that these rows had in a
    quantized base.
    """

    updates: Sequence[PartUpdate]
    raw: np.ndarray
    exact: bool
    noise: float = 0.0


class LazyMatrix:
    """A matrix ``[out, in]`` whose rows ``read`` returns, from a start and a stop, when they are indexed;
    both are multiples of ``step``, or the stop is the end.
    """

    ndim = 2

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        read: Callable[[int, int], np.ndarray],
        step: int = 1,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self._read = read
        self._step = step

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        first = start // self._step * self._step
        last = -(-stop // self._step) * self._step
        return self._read(first, min(self.shape[0], last))[start - first : stop - first]

    def astype(self, dtype: Any, copy: bool = True) -> np.ndarray:
        """Reads the whole matrix."""
        return self[:].astype(dtype, copy=copy)


class Reader(NamedTuple):
    """How the base stores a weight.

    Attributes:
        work: the dtype in which changes are computed.
        shape: rows and columns as stored, for walking through a weight that no adapter changes.
        matrices: returns the matrices ``[out, in]`` of the weight of a layer of a kind: arrays, or objects
            that return an array for a slice of rows. Raises :class:`Unsupported` if a weight in this format
            cannot belong to such a layer.
        opened: opens the weight for reading.
        decode: returns the values of raw rows in ``work``: the rows themselves or a buffer that is valid
            until the next call; read-only.
        step: blocks of rows begin and end at multiples of this.
        plain: the dtype of a weight that is stored as floats in the order of its matrix, else None.
    """

    work: np.dtype[Any]
    shape: tuple[int, int]
    matrices: Callable[[str], Sequence[Any]]
    opened: Callable[[], AbstractContextManager[Read]]
    decode: Callable[[np.ndarray, Scratch], np.ndarray]
    step: int = 1
    plain: np.dtype[Any] | None = None


class Writer(NamedTuple):
    """How the output stores a weight.

    Attributes:
        label: the name of the stored form in reports.
        parts: maps roles to the output's tensors, by their names in the base.
        encode: encodes rows into buffers that are valid until the next call. Raises :class:`NonFinite` if the
            format cannot store NaN or infinity.
        reread: returns the values of rows that ``encode`` has just stored, in the given dtype, as a reader
            would decode them.
        rest: returns a part that no update changed: the base's own, or an empty array if it has no rows.
        stochastic: whether values may be rounded stochastically.
        plain: as for a reader.
        read_only_reason: why a changed weight cannot be stored in this form; None if it can.
    """

    label: str
    parts: Mapping[str, str]
    encode: Callable[[np.ndarray, slice, Round, Scratch], EncodedRows]
    reread: Callable[[np.ndarray, np.dtype[Any], Scratch], np.ndarray]
    rest: Callable[[str], np.ndarray] = lambda role: np.empty(0, np.uint8)
    stochastic: bool = False
    plain: np.dtype[Any] | None = None
    read_only_reason: str | None = None


class WeightStorage(NamedTuple):
    """How one weight is stored in the base and in the output."""

    reader: Reader
    writer: Writer

    @property
    def main_tensor(self) -> str:
        """The tensor that represents the weight in the output, by its name in the base."""
        return self.writer.parts[MAIN_PART]

    @property
    def companions(self) -> tuple[str, ...]:
        """The other tensors of the weight, which are written together with it."""
        return tuple(name for role, name in self.writer.parts.items() if role != MAIN_PART)
