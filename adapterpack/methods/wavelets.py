"""Daubechies' wavelets, and one step of the inverse transform along an axis (Daubechies 1988, "Orthonormal bases of compactly supported
wavelets")."""

from __future__ import annotations

import re
from functools import lru_cache
from math import comb, sqrt
from typing import Any

import numpy as np

from ..errors import Unsupported
from .operators import Array

_ORDERS = 10
"""The orders that PEFT has."""


@lru_cache(maxsize=_ORDERS)
def filters(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high reconstruction filter of the wavelet ``db1`` to ``db10``: float64 ``[2 N]`` each.

    The half-band polynomial ``sum_k C(N-1+k, k) y^k`` is split by its roots; those inside the unit circle make the filter.

    Raises:
        Unsupported: another family or order.

    Example:
        >>> filters("db1")[1].round(4).tolist()
        [0.7071, -0.7071]
    """
    found = re.fullmatch(r"db([1-9][0-9]?)", name)
    order = int(found[1]) if found else 0
    if not 1 <= order <= _ORDERS:
        raise Unsupported("this wavelet is not known", expected=f"db1 to db{_ORDERS}", found=repr(name)[:40],
                          remedy="use another wavelet_family, or use_idwt=False")
    y = np.roots([comb(order - 1 + k, k) for k in range(order)][::-1]).astype(complex)
    middle, spread = 1 - 2 * y, np.sqrt((1 - 2 * y) ** 2 - 1)
    inside = np.where(np.abs(middle + spread) < 1, middle + spread, middle - spread)
    low = np.poly(inside).real
    for _ in range(order):
        low = np.convolve(low, [1, 1])
    low *= sqrt(2) / low.sum()
    return low, low[::-1] * (-1.0) ** np.arange(2 * order)


def inverse(xp: Any, coefficients: Array, low: np.ndarray, high: np.ndarray) -> Array:
    """One step of the inverse transform along the first axis: ``h`` coarse and then ``h`` fine rows -> ``2 h - 2 N + 2`` rows."""
    count, taps = coefficients.shape[0] // 2, len(low) // 2
    length = count - taps + 1
    halves = []
    for parity in (0, 1):
        parts = []
        for t in range(taps):
            start = taps - 1 - t
            parts.append(float(low[2 * t + parity]) * coefficients[start : start + length]
                         + float(high[2 * t + parity]) * coefficients[count + start : count + start + length])
        halves.append(sum(parts[1:], start=parts[0]))
    return xp.reshape(xp.stack(halves, axis=1), (2 * length, coefficients.shape[1]))
