"""The interfaces through which a merge reads blocks of a weight as the base stores it, and writes them as the
output does.

Reader and writer are independent: a weight that is read in one format and written in another, such as a
quantized one in bfloat16, has the reader of the first and the writer of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...io.buffers import Scratch
from ..rounding import Round

MAIN_PART = "codes"
"""The role that every format has: the part whose tensor stands for the weight."""
Read = Callable[[slice, int, Scratch], np.ndarray]
"""Stored rows, and how many numbers each has -> their raw form, in a buffer that is valid until the next
call.
"""


class PartUpdate(NamedTuple):
    """New values for ``rows`` of one part, or for ``columns`` of these rows. A row of a part that is a run of
    bytes is one byte.
    """

    part: str
    rows: slice
    values: np.ndarray
    columns: slice | None = None


class EncodedRows(NamedTuple):
    """A block as it is stored.

    ``updates`` are written to the parts. ``raw`` is what :meth:`Writer.reread` decodes, ``exact`` says that
    nothing was rounded, and ``noise`` is the expected squared error of the grid that these rows had in a
    quantized base.
    """

    updates: Sequence[PartUpdate]
    raw: np.ndarray
    exact: bool
    noise: float = 0.0


class Reader(Protocol):
    """How the base stores a weight.

    ``work`` is the dtype of its numbers while they are folded; blocks of rows begin at multiples of ``step``.
    ``shape`` is used to walk through a weight that no adapter changes.
    """

    @property
    def work(self) -> np.dtype[Any]:
        """The dtype in which changes are computed."""
        ...

    @property
    def step(self) -> int:
        """How many rows belong together: blocks begin and end at multiples of it."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of what is stored."""
        ...

    def matrices(self, kind: str) -> Sequence[Any]:
        """The matrices ``[out, in]`` of the weight of a layer of that kind: arrays, or objects that return an
        array for a slice of rows.

        Raises:
            Unsupported: a weight in this format cannot belong to such a layer.
        """
        ...

    def opened(self) -> AbstractContextManager[Read]:
        """The weight, ready to be read."""
        ...

    def decode(self, raw: np.ndarray, scratch: Scratch) -> np.ndarray:
        """The numbers of rows, in ``work``: ``raw`` itself, or a buffer that is valid until the next call;
        for reading only.
        """
        ...


class Writer(Protocol):
    """How the output stores a weight.

    ``label`` names it in reports. ``parts`` are the output's tensors by role, with the names that they have
    in the base. ``stochastic`` says that it can round stochastically, ``read_only_reason`` why it cannot
    write, if it cannot.
    """

    @property
    def label(self) -> str:
        """What reports call the stored dtype."""
        ...

    @property
    def parts(self) -> Mapping[str, str]:
        """The tensors of the output that hold the weight, by role."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether values may be rounded stochastically."""
        ...

    @property
    def read_only_reason(self) -> str | None:
        """Why no changed weight can be stored in this form; None where one can."""
        ...

    def encode(self, values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> EncodedRows:
        """Encodes rows, into buffers that are valid until the next call.

        Raises:
            NonFinite: there is NaN or infinity, which the format cannot hold.
        """
        ...

    def reread(self, raw: np.ndarray, work: np.dtype[Any], scratch: Scratch) -> np.ndarray:
        """The numbers of rows that ``encode`` has just stored, as the reader would give those of the base."""
        ...

    def rest(self, role: str) -> np.ndarray:
        """A part that no update was for: as it is in the base."""
        ...


class WeightStorage(NamedTuple):
    """How one weight is stored in the base, and how in the output."""

    reader: Reader
    writer: Writer

    @property
    def main_tensor(self) -> str:
        """The tensor that stands for the weight in the output, by its name in the base."""
        return self.writer.parts[MAIN_PART]

    @property
    def companions(self) -> tuple[str, ...]:
        """The other tensors of the weight, which are written together with it."""
        return tuple(name for role, name in self.writer.parts.items() if role != MAIN_PART)
