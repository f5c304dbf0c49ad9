"""Encodes and decodes quantized matrices: small integer codes with scales, one direction after the other.

A low-rank factor consists of a few long vectors, its directions: rows of ``A``, columns of ``B``. They differ
in size and importance, so each has its own scales and code. The bytes of a packed tensor are first the scales
of all directions in order, one for every ``group`` numbers, as bfloat16 (the upper half of a float32,
little-endian), and then the codes of each direction, padded to complete bytes; the first code of a byte is in
its lowest bits. A number is the value of its code times its scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..errors import FormatError, NonFinite
from ..manifest import Packed, Run

_MOST_OF_ALL = float(np.finfo(np.float32).max)
_MOST = _MOST_OF_ALL / 4
"""Larger numbers are clipped to this, so that no value overflows."""


class Code(NamedTuple):
    """A set of values, symmetric about zero. ``nearest`` returns the codes of numbers up to ``largest`` in
    magnitude; ``values`` returns the float32 values of codes, none larger than ``farthest``, because a file
    may contain codes that ``nearest`` never returns.

    ``tried`` are the scales to try, relative to the one that reaches the largest number: with few values,
    clipping some numbers makes the others more accurate.
    """

    name: str
    bits: int
    largest: float
    farthest: float
    nearest: Callable[[np.ndarray], np.ndarray]
    values: Callable[[np.ndarray], np.ndarray]
    tried: tuple[float, ...] = (1.0,)


def _float8(codes: np.ndarray) -> np.ndarray:
    numbers: np.ndarray = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return numbers


def _to_float8(numbers: np.ndarray) -> np.ndarray:
    codes: np.ndarray = (
        np.clip(numbers, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )
    return codes


CODES = {
    code.name: code
    for code in (
        Code(
            "int8",
            8,
            127,
            128,
            lambda x: np.clip(np.rint(x), -127, 127).astype(np.int8).view(np.uint8),
            lambda codes: codes.view(np.int8).astype(np.float32),
        ),
        Code("fp8", 8, 448, 448, _to_float8, _float8),
        Code(
            "int4",
            4,
            7,
            8,
            lambda x: (np.clip(np.rint(x), -7, 7) + 8).astype(np.uint8),
            lambda codes: codes.astype(np.float32) - 8,
            tuple(1 - 0.05 * step for step in range(9)),
        ),
        Code(
            "int2",
            2,
            1.5,
            1.5,
            lambda x: np.clip(np.floor(x + 2), 0, 3).astype(np.uint8),
            lambda codes: codes.astype(np.float32) - 1.5,
            tuple(1 - 0.05 * step for step in range(15)),
        ),
    )
}
"""Name -> code: the codes that a pack may use. A new one needs a new version of the format."""


class _Plan(NamedTuple):
    """The sizes of a packed matrix: directions, numbers and scales per direction, and total bytes."""

    directions: int
    length: int
    groups: int
    bytes: int


def _plan(packed: Packed) -> _Plan:
    rows = packed.shape[0]
    columns = math.prod(packed.shape[1:])
    directions, length = (rows, columns) if packed.axis == 0 else (columns, rows)
    groups = -(-length // packed.group)
    codes = sum(run.count * -(-length * CODES[run.code].bits // 8) for run in packed.runs)
    return _Plan(directions, length, groups, 2 * directions * groups + codes)


def problem(packed: Packed, data: np.ndarray | None, dtype: str, shape: Sequence[int]) -> str | None:
    """Returns what is wrong with a packed tensor of this dtype and shape, or None; ``data`` are its bytes, if
    they are to be checked, too.
    """
    unknown = next((run.code for run in packed.runs if run.code not in CODES), None)
    if unknown is not None:
        return f"a code that is not known here: {unknown}"
    if dtype != "U8" or tuple(shape) != (_plan(packed).bytes,):
        return (
            f"{dtype} {list(shape)} are not the {_plan(packed).bytes} bytes that stand for "
            f"{list(packed.shape)}"
        )
    if data is None:
        return None
    scales, stored = _split(data, packed)
    start = 0
    for run, codes in zip(packed.runs, stored, strict=True):
        code = CODES[run.code]
        one = scales[start : start + run.count]
        start += run.count
        if not np.all((one >= 0) & (one <= _MOST_OF_ALL / code.farthest)):  # nor NaN
            return "a scale that is negative or no number, or under which values overflow"
        if code.name == "fp8" and bool(((codes & 0x7F) == 0x7F).any()):
            return "a code that stands for no number"
    return None


def scale_codes(codes: np.ndarray, scales: np.ndarray, where: object) -> np.ndarray:
    """Multiplies int8 codes by their scales; float32.

    Raises:
        NonFinite: a scale is NaN, or so large that values overflow.
    """
    if overflows(scales):
        raise NonFinite(
            "a scale is no number, or so large that values overflow",
            where=where,
            remedy="quantize the adapter again",
        )
    made: np.ndarray = codes.astype(np.float32) * scales
    return made


def overflows(scales: np.ndarray) -> bool:
    """Whether int8 codes with these scales may give values that are not finite."""
    return not np.all(np.abs(scales) <= _MOST_OF_ALL / 128)  # nor NaN


def encode(
    value: np.ndarray, runs: Sequence[Run], axis: int, group: int | None = None
) -> tuple[np.ndarray, Packed]:
    """Quantizes a tensor ``[rows, ...]``; returns its bytes and how to read them. Without ``group`` each
    direction has one scale.

    Of the scales that a code tries, each group uses the one with the least squared error. For int8 and fp8
    that is the one without clipping, so an int8 number is off by at most half its scale.

    Example:
        >>> data, packed = encode(np.array([[0.5, -1.0], [2.0, 2.0]]), [Run(2, "int8")], axis=0)
        >>> len(data), decode(data, packed).round(2).tolist()
        (8, [[0.5, -1.0], [2.0, 2.0]])
    """
    matrix = np.clip(value.astype(np.float64).reshape(len(value), -1), -_MOST, _MOST)
    vectors = matrix if axis == 0 else matrix.T
    packed = Packed(tuple(value.shape), axis, min(group or vectors.shape[1], vectors.shape[1]), tuple(runs))
    scales = []
    stored = []
    start = 0
    for run in packed.runs:
        one, codes = _round(vectors[start : start + run.count], CODES[run.code], packed.group)
        scales.append(_upper_half(one))
        stored.append(_bytes(codes, CODES[run.code].bits))
        start += run.count
    return np.concatenate(
        [
            np.concatenate(scales).astype("<u2").view(np.uint8).reshape(-1),
            *(part.reshape(-1) for part in stored),
        ]
    ), packed


def decode(data: np.ndarray, packed: Packed, where: object = "a packed tensor") -> np.ndarray:
    """Returns the numbers that the bytes of a packed tensor represent, float32 of ``packed.shape``.

    Raises:
        FormatError: the number of bytes does not match the shape, or codes or scales are invalid; nothing is
            decoded then.
    """
    if wrong := problem(packed, data, "U8" if data.dtype == np.uint8 else str(data.dtype), data.shape):
        raise FormatError(
            "the bytes of a tensor are not those of its codes",
            where=where,
            found=wrong,
            remedy="quantize the pack again",
        )
    plan = _plan(packed)
    scales, stored = _split(data, packed)
    vectors = np.empty((plan.directions, plan.length), np.float32)
    start = 0
    for run, part in zip(packed.runs, stored, strict=True):
        code = CODES[run.code]
        vectors[start : start + run.count] = code.values(
            _codes(part.reshape(run.count, -1), code.bits, plan.length)
        )
        start += run.count
    for number in range(plan.groups):
        vectors[:, number * packed.group : (number + 1) * packed.group] *= scales[:, number, None]
    return np.ascontiguousarray(vectors if packed.axis == 0 else vectors.T).reshape(packed.shape)


def _round(vectors: np.ndarray, code: Code, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses scales ``[d, groups]`` for float64 ``vectors`` ``[d, n]``, and returns them with the codes
    ``[d, n]``.
    """
    count, length = vectors.shape
    groups = -(-length // group)
    filled = np.zeros((count, groups, group))
    filled.reshape(count, -1)[:, :length] = vectors
    peak = np.abs(filled).max(axis=2) / code.largest
    best = np.full(peak.shape, np.inf)
    chosen = peak
    # Tries each scale and keeps, per group, the one with the least squared error.
    for share in code.tried:
        scales = _round_up(peak * share)
        values = code.values(code.nearest(filled / scales[..., None])) * scales[..., None]
        error = np.square(values - filled).sum(axis=2)
        better = error < best
        best = np.where(better, error, best)
        chosen = np.where(better, scales, chosen)
    return chosen, code.nearest(filled / chosen[..., None]).reshape(count, -1)[:, :length]


def _round_up(scales: np.ndarray) -> np.ndarray:
    """Rounds up to numbers that bfloat16 holds, as float64; zero becomes the smallest normal number."""
    return (_upper_half(scales).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _upper_half(scales: np.ndarray) -> np.ndarray:
    """Returns the upper halves of float32 scales, rounded up."""
    singles = np.maximum(scales, np.finfo(np.float32).tiny).astype(np.float32)
    singles = np.where(singles < scales, np.nextafter(singles, np.float32(np.inf)), singles)
    halves: np.ndarray = ((singles.view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16).astype(np.uint16)
    return halves


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes ``[d, n]`` into bytes ``[d, ...]``."""
    each = 8 // bits
    filled = np.zeros((len(codes), -(-codes.shape[1] // each) * each), np.uint8)
    filled[:, : codes.shape[1]] = codes
    parts = filled.reshape(len(codes), -1, each) << (np.arange(each, dtype=np.uint8) * bits)
    made: np.ndarray = np.bitwise_or.reduce(parts, axis=2)
    return made


def _codes(data: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Unpacks the codes ``[d, length]`` from bytes ``[d, ...]``."""
    each = 8 // bits
    parts = (data[:, :, None] >> (np.arange(each, dtype=np.uint8) * bits)) & ((1 << bits) - 1)
    return parts.reshape(len(data), -1)[:, :length].astype(np.uint8)


def _split(data: np.ndarray, packed: Packed) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the scales ``[directions, groups]`` as float32, and the bytes of each run."""
    plan = _plan(packed)
    ends = np.cumsum(
        [
            2 * plan.directions * plan.groups,
            *(run.count * -(-plan.length * CODES[run.code].bits // 8) for run in packed.runs),
        ]
    )
    head, *stored = np.split(data, ends[:-1])
    scales = np.frombuffer(head.tobytes(), "<u2").astype(np.uint32) << 16
    return scales.view(np.float32).reshape(plan.directions, plan.groups), stored
