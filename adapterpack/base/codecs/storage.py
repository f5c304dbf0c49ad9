"""Defines the interfaces with which a merge reads blocks of a weight as the base stores it, and writes them
as the output does.

Reader and writer are independent: a quantized weight written in bfloat16 has the reader of its quantized
format and a plain writer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...io.buffers import Scratch
from ..rounding import Round

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

    ``updates`` are written to the parts. ``raw`` is what :meth:`Writer.reread` decodes, ``exact`` means that
    nothing was rounded, and ``noise`` is the expected squared error of the grid that these rows had in a
    quantized base.
    """

    updates: Sequence[PartUpdate]
    raw: np.ndarray
    exact: bool
    noise: float = 0.0


class Reader(Protocol):
    """How the base stores a weight.

    ``work`` is the dtype in which changes are computed; blocks of rows begin at multiples of ``step``.
    ``shape`` serves to walk through a weight that no adapter changes.
    """

    @property
    def work(self) -> np.dtype[Any]:
        """The dtype in which changes are computed."""
        ...

    @property
    def step(self) -> int:
        """Blocks of rows begin and end at multiples of this."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns as stored."""
        ...

    def matrices(self, kind: str) -> Sequence[Any]:
        """Returns the matrices ``[out, in]`` of the weight of a layer of that kind: arrays, or objects that
        return an array for a slice of rows.

        Raises:
            Unsupported: a weight in this format cannot belong to such a layer.
        """
        ...

    def opened(self) -> AbstractContextManager[Read]:
        """Opens the weight for reading."""
        ...

    def decode(self, raw: np.ndarray, scratch: Scratch) -> np.ndarray:
        """Returns the values of rows in ``work``: ``raw`` itself or a buffer that is valid until the next
        call; read-only.
        """
        ...


class Writer(Protocol):
    """How the output stores a weight.

    ``label`` names the form in reports. ``parts`` maps roles to the output's tensors, by their names in the
    base. ``stochastic`` says whether it can round stochastically, and ``read_only_reason`` why it cannot
    write, if it cannot.
    """

    @property
    def label(self) -> str:
        """The name of the stored form in reports."""
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
        """Why a changed weight cannot be stored in this form; None if it can."""
        ...

    def encode(self, values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> EncodedRows:
        """Encodes rows into buffers that are valid until the next call.

        Raises:
            NonFinite: the format cannot store NaN or infinity.
        """
        ...

    def reread(self, raw: np.ndarray, work: np.dtype[Any], scratch: Scratch) -> np.ndarray:
        """Returns the values of rows that ``encode`` has just stored, as a reader would decode them."""
        ...

    def rest(self, role: str) -> np.ndarray:
        """Returns a part without updates, as it is in the base."""
        ...


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
