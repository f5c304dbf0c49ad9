"""Daubechies' wavelets, and one step of the inverse transform along an axis (Daubechies 1988, "Orthonormal bases of compactly supported
wavelets")."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from typing import Any

import numpy as np

from ...errors import Unsupported
from .operators import Array

_ORDERS = 10
"""The orders that PEFT has."""


def _daubechies(order: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The half-band polynomial ``sum_k C(N-1+k, k) y^k`` is split by its roots; those inside the unit circle make the filter."""
    y = np.roots([comb(order - 1 + k, k) for k in range(order)][::-1]).astype(complex)
    middle, spread = 1 - 2 * y, np.sqrt((1 - 2 * y) ** 2 - 1)
    inside = np.where(np.abs(middle + spread) < 1, middle + spread, middle - spread)
    low = np.poly(inside).real
    for _ in range(order):
        low = np.convolve(low, [1, 1])
    low *= sqrt(2) / low.sum()
    return tuple(low.tolist()), tuple((low[::-1] * (-1.0) ** np.arange(2 * order)).tolist())


_FILTERS = {f"db{order}": _daubechies(order) for order in range(1, _ORDERS + 1)}
"""A table of numbers, which torch.compile takes as they are."""


def filters(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The low and the high reconstruction filter of the wavelet ``db1`` to ``db10``: ``2 N`` numbers each.

    Raises:
        Unsupported: another family or order.

    Example:
        >>> [round(value, 4) for value in filters("db1")[1]]
        [0.7071, -0.7071]
    """
    if name not in _FILTERS:
        raise Unsupported("this wavelet is not known", expected=f"db1 to db{_ORDERS}", found=repr(name)[:40],
                          remedy="use another wavelet_family, or use_idwt=False")
    return _FILTERS[name]


def inverse(xp: Any, coefficients: Array, low: Sequence[float], high: Sequence[float]) -> Array:
    """One step of the inverse transform along the first axis: ``h`` coarse and then ``h`` fine rows -> ``2 h - 2 N + 2`` rows."""
    count, taps = coefficients.shape[0] // 2, len(low) // 2
    length = count - taps + 1
    halves = []
    for parity in (0, 1):
        parts = []
        for t in range(taps):
            start = taps - 1 - t
            parts.append(low[2 * t + parity] * coefficients[start : start + length]
                         + high[2 * t + parity] * coefficients[count + start : count + start + length])
        halves.append(sum(parts[1:], start=parts[0]))
    return xp.reshape(xp.stack(halves, axis=1), (2 * length, coefficients.shape[1]))
