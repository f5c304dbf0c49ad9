"""Checks the values of tensors: finite, not all zero, and within the range of the formats they will be used
in. AP301-AP304.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ....errors import NonFinite
from ....io import FLOATS, TENSORS, all_finite, dtype_name
from .context import Budget, Subject, group_pointer, quantized_numbers
from .finding import Finding, check_rule

NONFINITE = check_rule("AP301", NonFinite)
NO_EFFECT = check_rule("AP302")
HUGE = check_rule("AP303")
OVERFLOW = check_rule("AP304")

LARGEST = 1e4
_BLOCK = 1 << 20
_FLOAT16 = float(np.finfo(np.float16).max)
_FUSED = "the size of the fused changes"


def finite(s: Subject) -> Iterator[Finding]:
    """AP301-AP303, in blocks of a million values."""
    zero = set()
    for name, info in s.file.tensors.items():
        value = s.file.read(name).reshape(-1)
        most, nothing = 0.0, True
        for start in range(0, value.size, _BLOCK):
            s.budget.require_time("the values of the tensors")
            block = value[start : start + _BLOCK]
            if not all_finite(block):
                yield NONFINITE.at(name, "the tensor holds NaN or infinity", file=TENSORS, offset=info.offset)
                break
            nothing = nothing and not np.any(block)
            if dtype_name(value.dtype) in FLOATS:
                most = max(most, largest(block))
        if most > LARGEST:
            yield HUGE.at(name, f"the largest value is {most:.3g}", file=TENSORS, offset=info.offset)
        if nothing:
            zero.add(name)
    without = {entry.group for name, entry in s.manifest.tensors.items() if name in zero}
    for number, group in enumerate(s.manifest.groups):
        if group.role == "adapter" and group.path in without:
            yield NO_EFFECT.at(
                group.path,
                "a tensor of this site is all zero: the adapter has no effect there",
                pointer=group_pointer(number),
            )


def largest(value: np.ndarray) -> float:
    """Returns the largest magnitude in a non-empty array."""
    return max(abs(float(value.max())), abs(float(value.min())))


def fused(s: Subject) -> Iterator[Finding]:
    """AP304, by the Cauchy-Schwarz bound ``|scale| * max_i |up_i| * max_j |down_j|`` on the entries of
    ``scale * up @ down``.
    """
    coded = quantized_numbers(s.manifest)
    for number, group in enumerate(s.manifest.groups):
        if group.role != "adapter" or not s.pack.method_of(group).traits.low_rank:
            continue
        s.budget.require_time(_FUSED)
        s.require_memory(8 * coded[group.path], _FUSED)  # in float32
        matrices = [value for value in s.pack.params(group.path).values() if value.ndim == 2]
        pairs = [
            (up, down)
            for up in matrices
            for down in matrices
            if up is not down and up.shape[1] == down.shape[0] == group.rank
        ]
        if len(pairs) != 1 or group.scale is None:
            continue  # not the plain product of two factors
        up, down = pairs[0]
        if abs(group.scale) * largest(up) * largest(down) * len(down) <= _FLOAT16:
            continue  # no norm is larger than the largest magnitude times the root of the rank
        bound = abs(group.scale) * _norm(up, 1, s.budget) * _norm(down, 0, s.budget)
        if not bound <= _FLOAT16:
            yield OVERFLOW.at(
                group.path,
                f"an entry of the fused change can reach {bound:.3g}, float16 ends at 65504",
                pointer=group_pointer(number),
            )


def _norm(value: np.ndarray, axis: int, budget: Budget) -> float:
    """Returns the largest Euclidean norm along an axis of a matrix, without intermediate overflow and a block
    of rows at a time.
    """
    top = largest(value)
    if top == 0 or not math.isfinite(top):
        return top
    squares = np.zeros(value.shape[1 - axis], np.float64)
    step = max(1, _BLOCK // value.shape[1])
    for start in budget.over(range(0, len(value), step), _FUSED):
        rows = value[start : start + step]
        rows = rows.astype(np.float32) / np.float32(top) if top < 1e38 else rows.astype(np.float64) / top
        if axis == 1:
            squares[start : start + step] = np.einsum("ij,ij->i", rows, rows)
        else:
            squares += np.einsum("ij,ij->j", rows, rows)
    return top * math.sqrt(float(squares.max()))
