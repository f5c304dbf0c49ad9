"""Rounds merged values to the dtype in which they are stored: to nearest, or stochastically with chance that
depends on the position.

Stochastic rounding goes up with the probability of what is cut off, so that a change smaller than half a unit
is kept on average. Its chance comes from Philox4x64 (Salmon et al., SC 2011), a generator that is a function
of (key, counter): the key is a hash of the seed and the tensor's name, the counter is the index of the
element. So bytes depend neither on threads nor on blocks, order or shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ..io.buffers import Scratch
from ..io.safetensors import DTYPES

Round = Callable[[np.ndarray, "np.dtype[Any]", Scratch], np.ndarray]
"""Rounds values to a dtype, into a buffer that is valid until the next call."""
Rounding = Callable[[str, int], Round]
"""Name of a tensor and index of a block's first element -> how that block is rounded."""
_WORDS = 8
"""Words of 32 bits for each step of Philox's counter."""
_FIELDS = {"BF16": (8, 7), "F16": (5, 10), "F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}
"""Bits of the exponent and of the fraction."""


def nearest(name: str, start: int) -> Round:
    """To nearest, ties to even."""
    return to_nearest


def to_nearest(values: np.ndarray, dtype: np.dtype[Any], scratch: Scratch) -> np.ndarray:
    """Values rounded to nearest, ties to even; values of that dtype are returned as they are."""
    if values.dtype == dtype:
        return values
    stored = scratch.get("stored", values.shape, dtype)
    np.copyto(stored, values, casting="unsafe")
    return stored


def stochastic(seed: int) -> Rounding:
    """Stochastic rounding from float32 to anything narrower; everything else is rounded to nearest.

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
    """32 random bits for each of ``count`` elements of a tensor, from element ``start`` on: uint32."""
    key = int.from_bytes(
        hashlib.sha256(f"adapterpack stochastic rounding\0{seed}\0{name}".encode()).digest()[:16], "little"
    )
    first = start // _WORDS
    last = -(-(start + count) // _WORDS)
    drawn = np.random.Philox(key=key, counter=first).random_raw(4 * (last - first))
    drawn_words: np.ndarray = drawn.astype("<u8", copy=False).view(np.uint32)[start - first * _WORDS :][
        :count
    ]
    return drawn_words


def _stochastic(values: np.ndarray, dtype: np.dtype[Any], chance: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Float32 ``values`` cut to ``dtype`` after a random part of a unit in the last place was added to their
    magnitude.

    NaN stays NaN; a number above the largest becomes what a cast makes of it.
    """
    exponent_bits, fraction_bits = _FIELDS[
        next(name for name, candidate in DTYPES.items() if candidate == dtype)
    ]
    bits = np.ascontiguousarray(values).view(np.uint32)
    # bfloat16: the upper half of float32, so the magnitude's bits are an integer and the carry is the
    # rounding
    if exponent_bits == 8:
        magnitude = bits & np.uint32(0x7FFFFFFF)
        up = magnitude + (chance >> np.uint32(16))
        up[magnitude >= 0x7F800000] = magnitude[magnitude >= 0x7F800000]  # infinity and NaN
        nan = magnitude > 0x7F800000
        codes = ((up >> np.uint32(16)) | ((bits >> np.uint32(16)) & np.uint32(0x8000))).astype(np.uint16)
        codes[nan] |= np.uint16(0x0040)
        return codes.view(dtype)
    # In units of the format at the value's size, which stop shrinking below its normal numbers: |x| = q *
    # unit, exactly.
    least = 2 - (1 << exponent_bits - 1)  # the exponent of the smallest normal number
    wide = np.abs(values.astype(np.float64))
    with np.errstate(invalid="ignore", over="ignore"):
        _, exponent = np.frexp(wide)
        unit = np.ldexp(1.0, np.maximum(exponent - 1, least) - fraction_bits)
        rounded = np.floor(wide / unit + chance * 2.0**-32) * unit
        stored: np.ndarray = np.copysign(rounded, values).astype(np.float32).astype(dtype)
        return stored  # exact: a number of the format, or larger than its largest
