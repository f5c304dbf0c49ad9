"""Unpacks and packs the codes and scales in llama.cpp's blocks: ``blocks`` are ``[n, m]`` structures, codes
``[n, m, values]``.

Each function reads, and the one with ``put_`` before its name is its inverse.
"""

from __future__ import annotations

import numpy as np

Blocks = np.ndarray
_HALVES = np.array([0, 4], np.uint8)
_CRUMBS = np.array([0, 2, 4, 6], np.uint8)


def _minus(codes: np.ndarray, offset: int) -> np.ndarray:
    """Subtracts an offset from uint8 codes, giving int8; returns them unchanged if the offset is zero."""
    signed: np.ndarray = codes.astype(np.int8) - np.int8(offset)
    return signed if offset else codes


def nibbles(offset: int, blocks: Blocks) -> np.ndarray:
    """Reads the first half of a block's codes from the low halves of bytes, the second from the high ones;
    subtracts ``offset``.
    """
    raw = blocks["qs"]
    return _minus(np.concatenate([raw & 15, raw >> 4], axis=-1), offset)


def put_nibbles(offset: int, blocks: Blocks, codes: np.ndarray) -> None:
    """Writes what :func:`nibbles` reads."""
    low, high = np.split((codes + offset).astype(np.uint8), 2, axis=-1)
    blocks["qs"] = low & 15 | high << 4


def fives(offset: int, blocks: Blocks) -> np.ndarray:
    """Reads codes as :func:`nibbles` does, with their fifth bits from a separate word."""
    high = np.unpackbits(blocks["qh"], axis=-1, bitorder="little")
    return _minus(nibbles(0, blocks) | high << 4, offset)


def put_fives(offset: int, blocks: Blocks, codes: np.ndarray) -> None:
    """Writes what :func:`fives` reads."""
    raw = (codes + offset).astype(np.uint8)
    blocks["qh"] = np.packbits(raw >> 4, axis=-1, bitorder="little")
    put_nibbles(0, blocks, raw & 15)


def eights(blocks: Blocks) -> np.ndarray:
    """Reads one byte per code."""
    codes: np.ndarray = blocks["qs"]
    return codes


def put_eights(blocks: Blocks, codes: np.ndarray) -> None:
    """Writes what :func:`eights` reads."""
    blocks["qs"] = codes


def _crumbs(raw: np.ndarray) -> np.ndarray:
    """Reads two-bit codes: from ``[..., 64]`` bytes, each 32 of which hold four runs of 32 codes at
    increasing bit positions, to ``[..., 256]``.
    """
    parts: np.ndarray = raw.reshape(*raw.shape[:-1], 2, 1, 32) >> _CRUMBS[:, None] & 3
    return parts.reshape(*raw.shape[:-1], 256)


def _put_crumbs(codes: np.ndarray) -> np.ndarray:
    """Writes what :func:`_crumbs` reads."""
    parts = codes.reshape(*codes.shape[:-1], 2, 4, 32) << _CRUMBS[:, None]
    packed: np.ndarray = np.bitwise_or.reduce(parts, axis=-2)
    return packed.reshape(*codes.shape[:-1], 64)


def q2(blocks: Blocks) -> np.ndarray:
    """Reads Q2_K's codes of two bits."""
    return _crumbs(blocks["qs"])


def put_q2(blocks: Blocks, codes: np.ndarray) -> None:
    """Writes what :func:`q2` reads."""
    blocks["qs"] = _put_crumbs(codes.astype(np.uint8))


def q2_scales(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Reads Q2_K's scales from the low halves of bytes, its minima from the high ones."""
    return blocks["scales"] & 15, blocks["scales"] >> 4


def put_q2_scales(blocks: Blocks, scale: np.ndarray, minimum: np.ndarray | None) -> None:
    """Writes what :func:`q2_scales` reads."""
    assert minimum is not None
    blocks["scales"] = scale | minimum << 4


def q3(blocks: Blocks) -> np.ndarray:
    """Reads Q3_K's codes: two bits, and a third from a mask of 32 bytes, which has one bit position for each
    run of 32 codes; subtracts 4.
    """
    mask = blocks["hmask"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _minus(_crumbs(blocks["qs"]) | mask.reshape(*blocks.shape, 256) << 2, 4)


def put_q3(blocks: Blocks, codes: np.ndarray) -> None:
    """Writes what :func:`q3` reads."""
    raw = (codes + 4).astype(np.uint8)
    blocks["qs"] = _put_crumbs(raw & 3)
    mask = (raw >> 2).reshape(*blocks.shape, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    blocks["hmask"] = np.bitwise_or.reduce(mask, axis=-2)


def q3_scales(blocks: Blocks) -> tuple[np.ndarray, None]:
    """Reads Q3_K's sixteen scales of six bits, minus 32: four bits from the halves of the first 8 bytes, two
    bits from the last 4 bytes.
    """
    low, high = blocks["scales"][..., :8], blocks["scales"][..., 8:]
    four = (low[..., None, :] >> _HALVES[:, None] & 15).reshape(*blocks.shape, 16)
    two = (high[..., None, :] >> _CRUMBS[:, None] & 3).reshape(*blocks.shape, 16)
    return _minus(four | two << 4, 32), None


def put_q3_scales(blocks: Blocks, scale: np.ndarray, minimum: np.ndarray | None) -> None:
    """Writes what :func:`q3_scales` reads."""
    raw = (scale + 32).astype(np.uint8)
    four = (raw & 15).reshape(*blocks.shape, 2, 8) << _HALVES[:, None]
    two = (raw >> 4).reshape(*blocks.shape, 4, 4) << _CRUMBS[:, None]
    blocks["scales"] = np.concatenate(
        [np.bitwise_or.reduce(four, axis=-2), np.bitwise_or.reduce(two, axis=-2)], axis=-1
    )


def q4(blocks: Blocks) -> np.ndarray:
    """Reads Q4_K's codes in runs of 64: the first 32 from the low halves of 32 bytes, the others from the
    high ones.
    """
    raw: np.ndarray = blocks["qs"].reshape(*blocks.shape, 4, 1, 32) >> _HALVES[:, None] & 15
    return raw.reshape(*blocks.shape, 256)


def put_q4(blocks: Blocks, codes: np.ndarray) -> None:
    """Writes what :func:`q4` reads."""
    parts = codes.astype(np.uint8).reshape(*blocks.shape, 4, 2, 32) << _HALVES[:, None]
    blocks["qs"] = np.bitwise_or.reduce(parts, axis=-2).reshape(*blocks.shape, 128)


def q5(blocks: Blocks) -> np.ndarray:
    """Reads Q5_K's codes as :func:`q4` does, with a fifth bit from 32 bytes, which have one bit position for
    each run of 32 codes.
    """
    high = blocks["qh"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _minus(q4(blocks) | high.reshape(*blocks.shape, 256) << 4, 0)


def put_q5(blocks: Blocks, codes: np.ndarray) -> None:
    """Writes what :func:`q5` reads."""
    raw = codes.astype(np.uint8)
    high = (raw >> 4).reshape(*blocks.shape, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    blocks["qh"] = np.bitwise_or.reduce(high, axis=-2)
    put_q4(blocks, raw & 15)


def six_bits(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Reads eight scales and eight minima of six bits of Q4_K and Q5_K from twelve bytes; the top bits of the
    first eight bytes belong to the last four of each.
    """
    first, second, third = np.split(blocks["scales"], 3, axis=-1)
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1)
    minimum = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1)
    return scale, minimum


def put_six_bits(blocks: Blocks, scale: np.ndarray, minimum: np.ndarray | None) -> None:
    """Writes what :func:`six_bits` reads."""
    assert minimum is not None
    (s, top_s), (m, top_m) = (np.split(values.astype(np.uint8), 2, axis=-1) for values in (scale, minimum))
    blocks["scales"] = np.concatenate(
        [s | top_s >> 4 << 6, m | top_m >> 4 << 6, top_s & 15 | (top_m & 15) << 4], axis=-1
    )


def q6(blocks: Blocks) -> np.ndarray:
    """Reads Q6_K's codes in runs of 128: four bits as two runs of 64, two bits as four runs of 32; subtracts
    32.
    """
    low = blocks["ql"].reshape(*blocks.shape, 2, 1, 64) >> _HALVES[:, None] & 15
    return _minus(low.reshape(*blocks.shape, 256) | _crumbs(blocks["qh"]) << 4, 32)


def put_q6(blocks: Blocks, codes: np.ndarray) -> None:
    """Writes what :func:`q6` reads."""
    raw = (codes + 32).astype(np.uint8)
    low = (raw & 15).reshape(*blocks.shape, 2, 2, 64) << _HALVES[:, None]
    blocks["ql"] = np.bitwise_or.reduce(low, axis=-2).reshape(*blocks.shape, 128)
    blocks["qh"] = _put_crumbs(raw >> 4)


def put_q6_scales(blocks: Blocks, scale: np.ndarray, minimum: np.ndarray | None) -> None:
    """Writes Q6_K's scales, signed bytes."""
    blocks["scales"] = scale
