"""Merges blocks with torch on a CUDA device or the CPU (``--device``), with the same interface as numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...base.codecs.storage import LazyMatrix, WeightStorage
from ...base.rounding import Round
from ...errors import ProviderError
from ...io.buffers import Scratch
from .blocks import WeightBlock, Write, block_sums
from .fold import Change, Contribution, prepare
from .loss import LossSums


class InTorch:
    """Computes on a device, in large blocks, so that transfers rather than calls take the time.

    Products and the methods' folds run on the device; the result is rounded and measured in numpy, so that
    the same code decides the bytes wherever they were computed.

    Raises:
        ProviderError: torch has no such device here.
    """

    def __init__(self, device: str) -> None:
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ProviderError(
                "torch has no such device here",
                where="device",
                found=repr(device),
                expected="cuda or cpu",
                remedy=(
                    "leave --device out to merge with numpy, or install a torch with CUDA on a machine that "
                    "has it"
                ),
            ) from error

    def elements(self, change: Change, storage: WeightStorage) -> int:
        """Returns a large block size, so that the device is busy."""
        return 1 << 23

    def prepare(
        self,
        contributions: Sequence[Contribution],
        dtype: np.dtype[Any],
        weight: np.ndarray | LazyMatrix,
        bias: np.ndarray | None,
    ) -> Change:
        """Computes on the device what all blocks of a matrix need."""
        return prepare(contributions, dtype, weight, bias, self._to_device)

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
        """Merges a block on the device."""
        old = storage.reader.decode(block.raw, scratch)
        weight = self._to_device(old.T if block.transposed else old)
        bias = None if block.bias is None else self._to_device(block.bias)
        delta, new, after = change.apply_to(weight, bias, block.rows)
        values = [
            np.ascontiguousarray((value.T if block.transposed else value).cpu().numpy())
            for value in (delta, new)
        ]
        stored = storage.writer.encode(values[1], block.stored, rounding, scratch)
        write(stored)
        sums = block_sums(storage, block, (old, *values), stored, scratch, moved, change.energy is None)
        return sums, None if after is None else after.cpu().numpy()

    def _to_device(self, value: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(value)).to(self.device)
