"""Chooses the implementation of a merge: numpy, torch on a device, or the compiled kernel, which merges a
block in one pass if the change is a product of factors and the weight is stored as floats.
"""

from __future__ import annotations

import numpy as np

from ..._native import lowrank
from ...base import Round, WeightStorage
from ...io import Scratch
from .blocks import Arithmetic, WeightBlock, Write
from .fold import Change
from .loss import LossSums


def choose_arithmetic(device: str | None, stochastic: bool) -> Arithmetic:
    """Returns the kernel or numpy for None, else torch on that device; the kernel does not support
    ``stochastic`` rounding.

    Raises:
        ProviderError: torch has no such device here.
    """
    if device is None:
        return Fused() if lowrank.COMPILED and not stochastic else Arithmetic()
    from .in_torch import InTorch  # noqa: PLC0415 - a merge without a device works without torch

    return InTorch(device)


class Fused(Arithmetic):
    """Computes with the compiled kernel where it can, rounding to nearest, and with numpy elsewhere.

    The kernel's blocks are larger than numpy's: a number passes through the caches once, and a block costs
    0.1 ms of the interpreter.
    """

    def elements(self, change: Change, storage: WeightStorage) -> int:
        """Returns a larger block size where the kernel applies, else numpy's."""
        return 1 << 20 if _kernel_applies(change, storage) else super().elements(change, storage)

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
        """Merges a block in one pass of the kernel, or as numpy does."""
        up, panels = change.up, change.panels
        if up is None or panels is None or block.transposed or not _kernel_applies(change, storage):
            return super().fold(change, storage, block, rounding, scratch, write, moved)
        out = scratch.get("stored", block.raw.shape, block.raw.dtype)
        error, inner, differs = lowrank.fold(block.raw, up[block.rows], panels, out)
        write(storage.writer.encode(out, block.stored, _pass_through, scratch))
        return LossSums(0.0, error, inner, moved or differs), block.bias


def _kernel_applies(change: Change, storage: WeightStorage) -> bool:
    """Whether the change is a product of factors, and weight and output are stored as floats of one dtype in
    the order of the matrix.
    """
    stored = storage.reader.plain
    return (
        change.panels is not None
        and change.is_plain
        and stored is not None
        and stored.name in lowrank.STORED
        and storage.writer.plain == stored
    )


def _pass_through(values: np.ndarray, dtype: np.dtype, scratch: Scratch) -> np.ndarray:
    """Returns the values unchanged: a :data:`~adapterpack.base.rounding.Round` for values that are rounded
    already.
    """
    return values
