"""Between the bytes of one weight and the numbers of its rows: a reader for how the base stores it, and a writer for how the output does.

A fold reads rows, changes them, and writes them back; what it does in between knows no way of storing. A weight that is written in
another form than it was read, such as a quantized one in bfloat16, is the reader of the one with the writer of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...io.buffers import Scratch
from ..rounding import Round

HOME = "codes"
"""The role of the part that stands for its weight: every way of storing has it."""
Read = Callable[[slice, int, Scratch], np.ndarray]
"""Stored rows, and how many numbers each has -> their raw form, in a buffer that is valid until the next call."""


class Piece(NamedTuple):
    """New values for a region of one part: ``rows`` of it, and of these the columns ``columns`` where it is not all.

    Where a part is a run of bytes, a row is one of them.
    """

    part: str
    rows: slice
    values: np.ndarray
    columns: slice | None = None


class Encoded(NamedTuple):
    """A block as it is stored.

    ``pieces`` are what is written. ``raw`` is what :meth:`Writer.reread` reads, ``exact`` whether that is just what was given, and
    ``noise`` the expected squared error of the grid on which these rows lay in a quantized base.
    """

    pieces: Sequence[Piece]
    raw: np.ndarray
    exact: bool
    noise: float = 0.0


class Reader(Protocol):
    """How the base stores a weight.

    ``work`` is the dtype of its numbers while they are folded; blocks of rows begin at multiples of ``step``. ``shape`` is the one in which
    the weight is gone through where no adapter changes it.
    """

    @property
    def work(self) -> np.dtype[Any]:
        """See above."""
        ...

    @property
    def step(self) -> int:
        """See above."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """See above."""
        ...

    def matrices(self, kind: str) -> Sequence[Any]:
        """The matrices ``[out, in]`` of the weight of a layer of that kind: arrays, or what gives an array for a slice of rows.

        Raises:
            Unsupported: a weight that is stored so cannot be one of that kind.
        """
        ...

    def opened(self) -> AbstractContextManager[Read]:
        """The weight, ready to be read."""
        ...

    def decode(self, raw: np.ndarray, scratch: Scratch) -> np.ndarray:
        """The numbers of rows, in ``work``: ``raw`` itself, or a buffer that is valid until the next call; for reading only."""
        ...


class Writer(Protocol):
    """How the output stores a weight.

    ``label`` names it in reports. ``parts`` are the output's tensors by role, with the names that they have in the base. ``by_chance`` says
    whether it can round stochastically, ``sealed`` why it cannot write at all, or None.
    """

    @property
    def label(self) -> str:
        """See above."""
        ...

    @property
    def parts(self) -> Mapping[str, str]:
        """See above."""
        ...

    @property
    def by_chance(self) -> bool:
        """See above."""
        ...

    @property
    def sealed(self) -> str | None:
        """See above."""
        ...

    def encode(self, values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> Encoded:
        """Stored rows from the numbers that they shall hold, in buffers that are valid until the next call.

        Raises:
            NonFinite: the form cannot hold NaN or infinity, and there is one.
        """
        ...

    def reread(self, raw: np.ndarray, work: np.dtype[Any], scratch: Scratch) -> np.ndarray:
        """The numbers of rows that ``encode`` has just stored, as the reader would give those of the base."""
        ...

    def rest(self, role: str) -> np.ndarray:
        """A part that no piece was for: as it is in the base."""
        ...


class Storage(NamedTuple):
    """How one weight is stored in the base, and how in the output."""

    reader: Reader
    writer: Writer

    @property
    def home(self) -> str:
        """The tensor that stands for the weight in the output, by its name in the base."""
        return self.writer.parts[HOME]

    @property
    def companions(self) -> tuple[str, ...]:
        """The tensors beside it that are written with it."""
        return tuple(name for role, name in self.writer.parts.items() if role != HOME)
