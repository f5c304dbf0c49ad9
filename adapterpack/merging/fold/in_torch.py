"""Merges blocks with torch on a CUDA device or the CPU (``--device``), with the same interface as numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...base import WeightStorage
from ...errors import ProviderError
from ...io import Scratch
from .blocks import Arithmetic, WeightBlock
from .fold import Change


class InTorch(Arithmetic):
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

    def compute(
        self, change: Change, block: WeightBlock, old: np.ndarray, scratch: Scratch
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Computes the change on the device."""
        weight = self.to_device(old.T if block.transposed else old)
        bias = None if block.bias is None else self.to_device(block.bias)
        *changed, moved = change.apply_to(weight, bias, block.rows)
        delta, new = (
            np.ascontiguousarray((value.T if block.transposed else value).cpu().numpy()) for value in changed
        )
        return delta, new, None if moved is None else moved.cpu().numpy()

    def to_device(self, value: np.ndarray) -> Any:
        """Returns the array as a tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(value)).to(self.device)
