"""Chooses what computes a merge: the compiled kernel, numpy, or torch on a device."""

from __future__ import annotations

from ..._native import lowrank
from .blocks import Arithmetic, InNumpy
from .fused import Fused


def arithmetic(device: str | None, stochastic: bool = False) -> Arithmetic:
    """The kernel or numpy for None, else torch on that device. ``stochastic`` rounding is not for the kernel.

    Raises:
        ProviderError: torch has no such device here.
    """
    if device is None:
        return Fused() if lowrank.COMPILED and not stochastic else InNumpy()
    from .in_torch import InTorch  # noqa: PLC0415 - a merge without a device works without torch

    return InTorch(device)
