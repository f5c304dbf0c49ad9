"""Where a fold is computed."""

from __future__ import annotations

from .blocks import Arithmetic, InNumpy


def arithmetic(device: str | None) -> Arithmetic:
    """numpy for None; else torch on that device.

    Raises:
        ProviderError: torch has no such device here.
    """
    if device is None:
        return InNumpy()
    from .in_torch import InTorch  # noqa: PLC0415 - a merge without a device works without torch

    return InTorch(device)
