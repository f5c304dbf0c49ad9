"""The filters of Daubechies wavelets and symlets, and one step of the inverse wavelet transform along an
axis.

The filters follow Daubechies 1988, "Orthonormal bases of compactly supported wavelets", and for the least
asymmetric ones 1992, "Ten Lectures on Wavelets", section 8.1.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt
from typing import Any

import numpy as np

from ...errors import Unsupported
from .operators import Array

_ORDERS = 10
"""The highest order that PEFT supports."""
_EQUAL = 1e-6
"""Two roots closer than this are the same root; the polynomials have only simple roots."""
_OUTSIDE: dict[int, tuple[int, ...]] = {
    2: (),
    3: (),
    4: (1,),
    5: (0,),
    6: (0, 2),
    7: (0,),
    8: (1, 3),
    9: (1, 2),
    10: (0, 2, 4),
}
"""Order of a symlet -> the roots outside of the unit circle that it uses, numbered by angle in the upper
half-plane.
"""


def _filters(order: int, outside: Sequence[int] = ()) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes the low and high filter of one order by spectral factorisation.

    The half-band polynomial ``sum_k C(N-1+k, k) y^k`` is split by its roots. The filter uses the root inside
    the unit circle of each pair, or the outside one (with its conjugate) for the roots numbered in
    ``outside``.
    """
    y = np.roots([comb(order - 1 + k, k) for k in range(order)][::-1]).astype(complex)
    middle = 1 - 2 * y
    spread = np.sqrt((1 - 2 * y) ** 2 - 1)
    roots = np.where(np.abs(middle + spread) < 1, middle + spread, middle - spread)
    upper = sorted((root for root in roots if root.imag > -_EQUAL), key=np.angle)
    for root in [upper[number] for number in outside]:
        pair = np.minimum(np.abs(roots - root), np.abs(roots - root.conjugate())) < _EQUAL
        roots = np.where(pair, 1 / roots, roots)
    low = np.poly(roots).real
    for _ in range(order):
        low = np.convolve(low, [1, 1])
    low *= sqrt(2) / low.sum()
    return tuple(low.tolist()), tuple((low[::-1] * (-1.0) ** np.arange(2 * order)).tolist())


_FILTERS = {f"db{order}": _filters(order) for order in range(1, _ORDERS + 1)}
_FILTERS |= {f"sym{order}": _filters(order, outside) for order, outside in _OUTSIDE.items()}
"""The filters as a table of plain numbers, which torch.compile treats as constants."""


def filters(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the low and the high reconstruction filter of a wavelet, ``2 N`` numbers each, for ``db1`` to
    ``db10`` or ``sym2`` to ``sym10``.

    Raises:
        Unsupported: the family or the order is another one.

    Example:
        >>> [round(value, 4) for value in filters("db1")[1]]
        [0.7071, -0.7071]
    """
    if name not in _FILTERS:
        raise Unsupported(
            "this wavelet is not known",
            expected=f"db1 to db{_ORDERS} or sym2 to sym{_ORDERS}",
            found=repr(name)[:40],
            remedy="use another wavelet_family, or use_idwt=False",
        )
    return _FILTERS[name]


def inverse(xp: Any, coefficients: Array, low: Sequence[float], high: Sequence[float]) -> Array:
    """Does one step of the inverse transform along the first axis: ``h`` coarse rows followed by ``h`` fine
    rows give ``2 h - 2 N + 2`` rows.
    """
    count = coefficients.shape[0] // 2
    taps = len(low) // 2
    length = count - taps + 1
    halves = []
    # Even and odd outputs use the even and odd filter taps (polyphase form), which avoids upsampling with
    # zeros.
    for parity in (0, 1):
        parts = []
        for t in range(taps):
            start = taps - 1 - t
            parts.append(
                low[2 * t + parity] * coefficients[start : start + length]
                + high[2 * t + parity] * coefficients[count + start : count + start + length]
            )
        halves.append(sum(parts[1:], start=parts[0]))
    return xp.reshape(xp.stack(halves, axis=1), (2 * length, coefficients.shape[1]))
