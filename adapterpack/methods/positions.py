"""Places in a weight that a seed stands for: those that PEFT draws by ``torch.randperm``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from .operators import Array
from .torch_random import TorchGenerator


@lru_cache(maxsize=64)
def places(seed: int, rows: int, columns: int, count: int) -> np.ndarray:
    """``count`` different places in ``[rows, columns]``, as rows and columns: int64 ``[2, count]``, in the order of the draw."""
    return np.stack(np.divmod(TorchGenerator(seed).permuted(rows * columns, count), columns))


def scattered(xp: Any, values: Array, at: Array, shape: tuple[int, int]) -> Array:
    """Zeros of ``shape`` with ``values`` ``[n]`` at ``at`` ``[2, n]``."""
    dense = xp.zeros(shape, dtype=values.dtype, device=values.device)
    dense[at[0], at[1]] = values
    return dense
