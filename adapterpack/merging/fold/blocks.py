"""One block of a weight, from stored bytes to stored bytes: decoded, changed, rounded once, and accounted for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...base.codecs.quantized_storage import Matrix
from ...base.codecs.storage import Encoded, Storage
from ...base.rounding import Round
from ...io.buffers import Scratch
from .fold import Change, Contribution, prepare
from .loss import Sums, sums_of

Write = Callable[[Encoded], None]
ELEMENTS = 1 << 18
"""Numbers of a block for numpy. Smaller ones stay in a nearer cache, but workers then pass the interpreter's lock to each other so often
that they lose more."""


class Block(NamedTuple):
    """A block as its reader gives it: ``raw`` is ``[stored rows, stored columns]``, ``stored`` says which rows of the tensor, ``rows``
    which rows of the matrix a method sees (the same, unless ``turned``), ``bias`` is their part of the bias in the fold's dtype."""

    raw: np.ndarray
    stored: slice
    rows: slice
    turned: bool
    bias: np.ndarray | None


class Arithmetic(Protocol):
    """Where the numbers of a fold are computed: with numpy, or by torch on a device."""

    def elements(self, change: Any, storage: Storage) -> int:
        """The numbers of a good block."""
        ...

    def prepare(self, contributions: Sequence[Contribution], dtype: np.dtype[Any], weight: np.ndarray | Matrix,
                bias: np.ndarray | None) -> Any:
        """See :func:`~adapterpack.merging.fold.fold.prepare`: what all blocks of one matrix have in common."""
        ...

    def turned(self, change: Any) -> Any | None:
        """The same change of the transposed matrix, or None where only the matrix itself can be changed."""
        ...

    def is_whole(self, change: Any) -> bool:
        """Whether a block must hold all rows."""
        ...

    def energy(self, change: Any) -> float | None:
        """``<D, D>`` of all of the matrix, if it is known beforehand: the sums of blocks then leave it out."""
        ...

    def fold(self, change: Any, storage: Storage, block: Block, rounding: Round, scratch: Scratch, write: Write,
             moved: bool) -> tuple[Sums, np.ndarray | None]:
        """Changes a block, gives it to ``write`` as it is stored, and says what became of it and of its bias.

        ``moved`` says that a stored byte of the tensor is known to differ already.
        """
        ...


class InNumpy:
    """The fold on the cores of this machine."""

    def elements(self, change: Change, storage: Storage) -> int:
        """See :class:`Arithmetic`."""
        return ELEMENTS

    def prepare(self, contributions: Sequence[Contribution], dtype: np.dtype[Any], weight: np.ndarray | Matrix,
                bias: np.ndarray | None) -> Change:
        """See :class:`Arithmetic`."""
        return prepare(contributions, dtype, weight, bias)

    def turned(self, change: Change) -> Change | None:
        """See :class:`Arithmetic`."""
        return change.turned()

    def is_whole(self, change: Change) -> bool:
        """See :class:`Arithmetic`."""
        return change.whole

    def energy(self, change: Change) -> float | None:
        """See :class:`Arithmetic`."""
        return change.energy

    def fold(self, change: Change, storage: Storage, block: Block, rounding: Round, scratch: Scratch, write: Write,
             moved: bool) -> tuple[Sums, np.ndarray | None]:
        """See :class:`Arithmetic`."""
        old = storage.reader.decode(block.raw, scratch)
        new, delta = scratch.get("new", old.shape, old.dtype), scratch.get("change", old.shape, old.dtype)
        lying = (old.T, delta.T, new.T) if block.turned else (old, delta, new)
        bias = change.apply(lying[0], block.bias, block.rows, lying[1], lying[2])
        stored = storage.writer.encode(new, block.stored, rounding, scratch)
        write(stored)
        return account(storage, block, (old, delta, new), stored, scratch, moved, change.energy is None), bias


def account(storage: Storage, block: Block, values: tuple[np.ndarray, ...], stored: Encoded, scratch: Scratch, moved: bool,
            energy: bool = True) -> Sums:
    """The sums of a block, given what it was, its change, what it should become and how it is stored; the first three are used up."""
    old, delta, new = values
    (reader, writer), work = storage, storage.reader.work
    if not moved and stored.raw.dtype == block.raw.dtype:
        moved = _differ(stored.raw, block.raw)
    if stored.exact:  # nothing but the sum itself was rounded
        moved = moved or bool(np.any(new != old))
        error = np.subtract(new, old, out=new)
        return sums_of(delta, np.subtract(error, delta, out=error), moved, energy=energy)
    if not moved:
        before = reader.decode(block.raw, scratch).copy()
        moved = bool(np.any(writer.reread(stored.raw, work, scratch) != before))
    back = writer.reread(stored.raw, work, scratch)
    return sums_of(delta, np.subtract(back, new, out=new), moved, energy=energy)._replace(noise=stored.noise)


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether any byte differs; most often one of the first row does."""
    return not all(np.array_equal(one[rows].view(np.uint8), other[rows].view(np.uint8)) for rows in (slice(0, 1), slice(1, None)))
