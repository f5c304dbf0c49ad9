"""Packs integers of 2, 3, 4 or 8 bits into 32-bit words, lowest bits first, and unpacks them.

With 3 bits, integers straddle word boundaries; 32 of them fill exactly three words.
"""

from __future__ import annotations

import numpy as np


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Returns the first ``count`` integers of each row of ``words`` ``[n, m]`` (int32 or uint32), as uint8
    ``[n, count]``.

    Example:
        >>> unpack(np.array([[0x21]], np.uint32), 4, 3).tolist()
        [[1, 2, 0]]
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    mask, whole = np.uint32((1 << bits) - 1), _whole(words.shape[1], bits)
    values = np.empty((len(words), whole), np.uint8)
    for at in range(_period(bits)):
        word, shift = divmod(at * bits, 32)
        field = words[:, word :: _stride(bits)] >> np.uint32(shift)
        if shift + bits > 32:
            field = field | words[:, word + 1 :: _stride(bits)] << np.uint32(32 - shift)
        values[:, at :: _period(bits)] = field & mask
    return values[:, :count]


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Returns words ``[n, ceil(count * bits / 32)]`` (int32) from integers ``[n, count]`` that fit into
    ``bits``; unused bits of the last word are zero.

    Example:
        >>> pack(np.array([[1, 2, 0]]), 4).tolist()
        [[33]]
    """
    period, stride = _period(bits), _stride(bits)
    cycles = -(-values.shape[1] // period)
    padded = np.zeros((len(values), cycles * period), np.uint32)
    padded[:, : values.shape[1]] = values
    words = np.zeros((len(values), cycles * stride), np.uint32)
    for at in range(period):
        word, shift = divmod(at * bits, 32)
        words[:, word::stride] |= padded[:, at::period] << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1 :: stride] |= padded[:, at::period] >> np.uint32(32 - shift)
    return words.view(np.int32)


def _period(bits: int) -> int:
    """Returns the number of integers after which one starts at a word boundary again."""
    return 32 if bits == 3 else 32 // bits


def _stride(bits: int) -> int:
    """Returns the number of words in a period."""
    return _period(bits) * bits // 32


def _whole(words: int, bits: int) -> int:
    """Returns how many integers fit into complete periods of so many words."""
    return words // _stride(bits) * _period(bits)
