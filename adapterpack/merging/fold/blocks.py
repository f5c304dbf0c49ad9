"""Merges one block of a weight: decodes it, adds the change, rounds once, and measures what rounding lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ...base import Round, WeightStorage
from ...base.codecs.storage import EncodedRows, LazyMatrix
from ...io import Scratch
from .fold import Change, Contribution, ToDevice, prepare
from .loss import LossSums, sums_of

Write = Callable[[EncodedRows], None]
ELEMENTS = 1 << 18
"""Numbers of a block for numpy. Smaller blocks fit into a nearer cache, but then workers pass the
interpreter's lock to each other so often that they lose more.
"""


class WeightBlock(NamedTuple):
    """A block that was read: ``raw`` ``[stored rows, stored columns]`` are the rows ``stored`` of the tensor
    and the rows ``rows`` of the matrix ``[out, in]`` (the same, unless ``transposed``); ``bias`` is their
    part of the bias in the dtype of the computation.
    """

    raw: np.ndarray
    stored: slice
    rows: slice
    transposed: bool
    bias: np.ndarray | None


class Arithmetic:
    """Computes merged blocks with numpy; subclasses compute with the compiled kernel, or with torch on a
    device.
    """

    to_device: ToDevice | None = None
    """Moves an array to the device that computes, if that is not numpy."""

    def elements(self, change: Change, storage: WeightStorage) -> int:
        """Returns how many numbers a block should have, so that it is merged fastest."""
        return ELEMENTS

    def prepare(
        self,
        contributions: Sequence[Contribution],
        dtype: np.dtype,
        weight: np.ndarray | LazyMatrix,
        bias: np.ndarray | None,
    ) -> Change:
        """Computes once what all blocks of a matrix need."""
        return prepare(contributions, dtype, weight, bias, self.to_device)

    def compute(
        self, change: Change, block: WeightBlock, old: np.ndarray, scratch: Scratch
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Returns the change of the decoded block ``old``, the changed block, and its part of the changed
        bias.
        """
        delta, new = (scratch.get(name, old.shape, old.dtype) for name in ("change", "new"))
        matrices = (old.T, delta.T, new.T) if block.transposed else (old, delta, new)
        return delta, new, change.apply(matrices[0], block.bias, block.rows, matrices[1], matrices[2])

    def fold(
        self,
        change: Change,
        storage: WeightStorage,
        block: WeightBlock,
        rounding: Round,
        scratch: Scratch,
        write: Write,
        moved: bool,
    ) -> tuple[LossSums, np.ndarray | None]:
        """Changes a block, passes its stored form to ``write``, and returns the sums for its loss and the
        changed bias.

        ``moved`` says that a stored byte of the tensor is known to differ from the base already.
        """
        old = storage.reader.decode(block.raw, scratch)
        delta, new, bias = self.compute(change, block, old, scratch)
        stored = storage.writer.encode(new, block.stored, rounding, scratch)
        write(stored)
        return _sums(storage, block, (old, delta, new), stored, scratch, moved, change.energy is None), bias


def _sums(
    storage: WeightStorage,
    block: WeightBlock,
    values: tuple[np.ndarray, ...],
    stored: EncodedRows,
    scratch: Scratch,
    moved: bool,
    energy: bool,
) -> LossSums:
    """Returns the sums of a block, from its old values, their change, the new values and the stored form;
    overwrites the first three.
    """
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
    reread = writer.reread(stored.raw, work, scratch)
    return sums_of(delta, np.subtract(reread, new, out=new), moved, energy=energy)._replace(
        noise=stored.noise
    )


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether any byte differs; the first row is compared first, since usually it differs already."""
    return not all(
        np.array_equal(one[rows].view(np.uint8), other[rows].view(np.uint8))
        for rows in (slice(0, 1), slice(1, None))
    )
