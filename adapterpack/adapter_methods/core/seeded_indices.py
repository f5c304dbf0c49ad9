"""Draws the places in a weight that a seed stands for, as PEFT does by ``torch.randperm``."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .torch_random import TorchGenerator


@lru_cache(maxsize=64)
def places(seed: int, rows: int, columns: int, count: int) -> np.ndarray:
    """``count`` different places in ``[rows, columns]``, as rows and columns: int64 ``[2, count]``, in the
    order of the draw.
    """
    return np.stack(np.divmod(TorchGenerator(seed).permute(rows * columns, count), columns))
