"""The weight format of MatMulBnb4: a flattened weight ``[N, K]`` as indices into one of two tables, two in a
byte, the first in the high half.

ONNX Runtime, contrib operator com.microsoft::MatMulBnb4: ``W.ravel()[i] = table[q[i]] * absmax[i //
block_size]``.
"""

from __future__ import annotations

import numpy as np

from ..adapter_methods.inits.loftq import NF4

_FP4 = np.array([0, 0.0052083333, 0.6666667, 1, 0.33333334, 0.5, 0.16666667, 0.25], np.float32)
TABLES = (np.concatenate([_FP4, -_FP4]), NF4.astype(np.float32))
"""The levels of each ``quant_type``: 0 is FP4, 1 is NF4 (QLoRA, arXiv 2305.14314, appendix E)."""


def quant_type(levels: np.ndarray) -> int | None:
    """Returns the operator's number for a table of 16 levels, or None if it has no such table.

    Example:
        >>> quant_type(TABLES[1]), quant_type(np.linspace(-1, 1, 16))
        (1, None)
    """
    return next((number for number, table in enumerate(TABLES) if np.array_equal(table, levels)), None)


def pack_nibbles(q: np.ndarray) -> np.ndarray:
    """Packs 4-bit codes, flattened, two in a byte; pads an odd number of them with zero.

    Example:
        >>> pack_nibbles(np.uint8([[1, 2], [3, 15]])).tolist(), pack_nibbles(np.uint8([5])).tolist()
        ([18, 63], [80])
    """
    flat = q.reshape(-1)
    packed = flat[0::2] << 4
    packed[: len(flat) // 2] |= flat[1::2]
    return packed
