"""Draws the positions in a weight that a seed determines, with the numbers of ``torch.randperm``, as PEFT
does.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .torch_random import TorchGenerator


@lru_cache(maxsize=64)
def places(seed: int, rows: int, columns: int, count: int) -> np.ndarray:
    """Returns ``count`` different positions in ``[rows, columns]`` in the order of the draw, as int64 ``[2,
    count]`` (row and column indices).
    """
    return np.stack(np.divmod(TorchGenerator(seed).permute(rows * columns, count), columns))
