"""The float types that graphs compute in, and how near a graph in each comes to the model in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..errors import UnknownName, Unsupported, nearest

ABSENT = np.float32(-1e9)
"""The score or logit of an absent token or label: its weight is zero, and it survives conversion to JSON."""
NONE_BELOW = -2e4
"""A smaller number stands for :data:`ABSENT`, in every float type."""
DEFAULT = "float32"


class Precision(NamedTuple):
    """One float type. ``absent`` is what stands for :data:`ABSENT` in it, and leaves room for a score to be
    added.

    ``tolerance`` is the largest difference from torch in float32, as a share of the largest output, with
    which a graph is published.
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
"""float32 on two runtimes differs by about 1e-6 of the largest logit, and every wrong graph so far by 1e-3 of
it or more. float16 rounds each value by 5e-4 of itself, and a model of many layers by several times that;
bfloat16 has three bits fewer, so eight times that.
"""


def precision(name: str) -> Precision:
    """The float type of that name.

    Raises:
        UnknownName: graphs are not made in it.

    Example:
        >>> precision("float16").absent
        -30000.0
    """
    if name not in PRECISIONS:
        raise UnknownName(
            "graphs are not made in this type", found=repr(name), remedy=nearest(name, PRECISIONS)
        )
    return PRECISIONS[name]


def convert(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """Numbers in the float type of a graph; an absent score stays absent.

    Raises:
        Unsupported: a number is too large for the type.

    Example:
        >>> convert(np.array([0.5, -1e9], np.float32), "float16", "head_bias").tolist()
        [0.5, -30000.0]
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result: np.ndarray = np.where(array <= ABSENT, PRECISIONS[dtype].absent, array).astype(dtype)
    if not np.isfinite(result).all() and np.isfinite(array).all():
        raise Unsupported(
            f"a number of this adapter is too large for {dtype}",
            where=where,
            found=f"{np.abs(array).max():.3g}",
            expected=f"at most {ml_dtypes.finfo(dtype).max}",
            remedy="export with --dtype float32",
        )
    return result


def balance(values: Mapping[str, np.ndarray], down: str, up: str) -> dict[str, np.ndarray]:
    """Values with every pair of factors ``PATH.down`` and ``PATH.up`` brought to one size, by a power of two:
    the product is the same.

    ``up`` holds an adapter's whole scale. In float16 one factor could be too small for its digits, and the
    other too large.

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
                result[name], result[other] = values[name] * factor, values[other] / factor
    return result
