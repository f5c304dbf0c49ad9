"""The float types of graphs: their substitutes for -1e9, their tolerances against torch in float32, and safe
conversion.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..adapter_methods import Arrays, Tensors
from ..errors import Unsupported, require_among

ABSENT = np.float32(-1e9)
"""The score or logit of an absent token or label. Its softmax is zero, and unlike -infinity it is
valid JSON.
"""
NONE_BELOW = -2e4
"""Any smaller number means :data:`ABSENT`, in every float type."""
DEFAULT = "float32"


class Precision(NamedTuple):
    """A float type of graphs. ``absent`` replaces :data:`ABSENT`, with room for a score to be added.
    ``tolerance`` is the largest permitted difference from torch in float32, relative to the largest output,
    for a graph to be published.
    """

    name: str
    absent: float
    tolerance: float


PRECISIONS = {
    one.name: one
    for one in (
        Precision("float32", float(ABSENT), 1e-4),
        Precision("float16", -3e4, 1e-2),
        Precision("bfloat16", float(ABSENT), 8e-2),
    )
}
"""Two runtimes in float32 differ by about 1e-6 of the largest logit, and every wrong graph so far differed by
at least 1e-3. float16 rounds each value by 5e-4, and a deep model by several times that; bfloat16 has three
bits fewer, hence eight times the error.
"""


def precision(name: str) -> Precision:
    """Returns the float type of that name.

    Raises:
        UnknownName: graphs cannot have this type.

    Example:
        >>> precision("float16").absent
        -30000.0
    """
    require_among("graphs are not made in this type", name, PRECISIONS)
    return PRECISIONS[name]


def convert(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """Converts numbers to the float type of a graph; an absent score stays absent.

    Raises:
        Unsupported: a number is too large for the type.

    Example:
        >>> convert(np.array([0.5, -1e9], np.float32), "float16", "head_bias").tolist()
        [0.5, -30000.0]
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = np.where(array <= ABSENT, PRECISIONS[dtype].absent, array).astype(dtype)
    if not np.isfinite(result).all() and np.isfinite(array).all():
        raise Unsupported(
            f"a number of this adapter is too large for {dtype}",
            where=where,
            found=f"{np.abs(array).max():.3g}",
            expected=f"at most {ml_dtypes.finfo(dtype).max}",
            remedy="export with --dtype float32",
        )
    return result


def balance(values: Tensors, down: str, up: str) -> Arrays:
    """Scales every pair of factors ``PATH.down`` and ``PATH.up`` to similar size by a power of two, which
    leaves their product unchanged.

    ``up`` holds the adapter's scale, so in float16 one factor could otherwise lose digits and the other
    overflow.

    Example:
        >>> factors = balance({"a.down": np.full((2, 1), 2.0**-12), "a.up": np.ones((1, 2))}, "down", "up")
        >>> [float(array.max()) for array in factors.values()]
        [0.015625, 0.015625]
    """
    result = dict(values)
    for name in values:
        path, _, field = name.rpartition(".")
        other = f"{path}.{up}"
        if field == down and other in values:
            sizes = [float(np.abs(values[one]).max(initial=0.0)) for one in (name, other)]
            if all(sizes) and all(map(np.isfinite, sizes)):
                factor = np.float32(2.0 ** round(float(np.log2(sizes[1] / sizes[0])) / 2))
                result[name] = values[name] * factor
                result[other] = values[other] / factor
    return result
