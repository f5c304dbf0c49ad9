"""Rounds merged values to the dtype in which they are stored: to nearest, or stochastically.

Stochastic rounding rounds up with a probability equal to the fraction that rounding down would drop, so that
changes smaller than half a unit survive on average. The random bits come from Philox4x64 (Salmon et al., SC
2011), which is a function of (key, counter): the key is a hash of the seed and the tensor's name, the counter
the index of the element. So the result is independent of threads, blocks, order and shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ..io import DTYPES, Scratch

Round = Callable[[np.ndarray, "np.dtype[Any]", Scratch], np.ndarray]
"""Rounds values to a dtype, into a buffer that is valid until the next call."""
Rounding = Callable[[str, int], Round]
"""Returns how to round a block, from the tensor's name and the index of the block's first element."""
_WORDS = 8
"""32-bit words for each step of Philox's counter."""
_FIELDS = {"BF16": (8, 7), "F16": (5, 10), "F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}
"""Bits of the exponent and of the fraction, by dtype."""


def nearest(name: str, start: int) -> Round:
    """Returns rounding to nearest, ties to even."""
    return to_nearest


def to_nearest(values: np.ndarray, dtype: np.dtype[Any], scratch: Scratch) -> np.ndarray:
    """Rounds values to nearest, ties to even; returns values of that dtype unchanged."""
    if values.dtype == dtype:
        return values
    stored = scratch.get("stored", values.shape, dtype)
    np.copyto(stored, values, casting="unsafe")
    return stored


def stochastic(seed: int) -> Rounding:
    """Returns stochastic rounding from float32 to anything narrower; everything else is rounded to nearest.

    Example:
        >>> one = stochastic(7)("w", 0)(np.full(1000, 1 + 2**-10, np.float32), DTYPES["BF16"], Scratch())
        >>> # an eighth of 1000, which nearest would make 0
        >>> 50 < int((one.astype(np.float32) > 1).sum()) < 200
        True
    """

    def round_at(name: str, start: int) -> Round:
        def rounding(values: np.ndarray, dtype: np.dtype[Any], scratch: Scratch) -> np.ndarray:
            if values.dtype != np.float32 or dtype.itemsize > 2:
                return to_nearest(values, dtype, scratch)
            chance = words(seed, name, start, values.size).reshape(values.shape)
            return _stochastic(values, dtype, chance, scratch)

        return rounding

    return round_at


def words(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """Returns 32 random bits (uint32) for each of ``count`` elements of a tensor, from element ``start``
    on.
    """
    key = int.from_bytes(
        hashlib.sha256(f"adapterpack stochastic rounding\0{seed}\0{name}".encode()).digest()[:16], "little"
    )
    # Start at the counter step that contains the first element, so that any block gets the same bits as in a
    # full pass.
    first = start // _WORDS
    last = -(-(start + count) // _WORDS)
    drawn = np.random.Philox(key=key, counter=first).random_raw(4 * (last - first))
    drawn_words: np.ndarray = drawn.astype("<u8", copy=False).view(np.uint32)[start - first * _WORDS :][
        :count
    ]
    return drawn_words


def _stochastic(values: np.ndarray, dtype: np.dtype[Any], chance: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Truncates float32 ``values`` to ``dtype`` after adding a random part of a unit in the last place to
    their magnitude.

    NaN stays NaN; a number above the largest becomes what a cast would make of it.
    """
    exponent_bits, fraction_bits = _FIELDS[
        next(name for name, candidate in DTYPES.items() if candidate == dtype)
    ]
    bits = np.ascontiguousarray(values).view(np.uint32)
    # bfloat16 is the upper half of float32: adding 16 random bits to the magnitude as an integer carries into
    # the upper half with the right probability.
    if exponent_bits == 8:
        magnitude = bits & np.uint32(0x7FFFFFFF)
        up = magnitude + (chance >> np.uint32(16))
        # Infinity and NaN must not change.
        up[magnitude >= 0x7F800000] = magnitude[magnitude >= 0x7F800000]
        nan = magnitude > 0x7F800000
        codes = ((up >> np.uint32(16)) | ((bits >> np.uint32(16)) & np.uint32(0x8000))).astype(np.uint16)
        codes[nan] |= np.uint16(0x0040)
        return codes.view(dtype)
    # Other formats: |x| = q * unit exactly, where the unit depends on the value's exponent and stops
    # shrinking at subnormal numbers.
    # The exponent of the smallest normal number; below it, units stop shrinking.
    least = 2 - (1 << exponent_bits - 1)
    wide = np.abs(values.astype(np.float64))
    with np.errstate(invalid="ignore", over="ignore"):
        _, exponent = np.frexp(wide)
        unit = np.ldexp(1.0, np.maximum(exponent - 1, least) - fraction_bits)
        rounded = np.floor(wide / unit + chance * 2.0**-32) * unit
        stored: np.ndarray = np.copysign(rounded, values).astype(np.float32).astype(dtype)
        # Exact, since the value is one of the format's, or larger than its largest.
        return stored
