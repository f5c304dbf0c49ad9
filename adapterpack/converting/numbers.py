"""Reads single numbers from untrusted files, and moves a scale from a file's number into factors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import FormatError, NonFinite, Unsupported, excerpt
from ..io import FLOATS, dtype_name


def finite_number(value: Any, where: str) -> float:
    """Returns a number of a JSON file.

    Raises:
        FormatError: it is not a number, or too large for a float.

    Example:
        >>> finite_number(2, "config.json")
        2.0
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) <= np.finfo(np.float64).max
    ):
        raise FormatError("this must be a finite number", where=where, found=excerpt(value))
    return float(value)


def tensor_number(value: np.ndarray, where: str) -> float:
    """Returns the number in a tensor with one element.

    Raises:
        FormatError: it has several elements, or holds integers.
        NonFinite: it is NaN or infinite.

    Example:
        >>> tensor_number(np.array([4.0], np.float32), "a.safetensors, alpha")
        4.0
    """
    if value.size != 1 or dtype_name(value.dtype) not in FLOATS:
        raise FormatError(
            "a scale must be one floating-point number", where=where, found=f"{value.dtype} {value.shape}"
        )
    number = float(value.reshape(())[()])
    if not math.isfinite(number):
        raise NonFinite("a scale is not finite", where=where, found=number)
    return number


def most_frequent(values: Iterable[float]) -> float | None:
    """Returns the most frequent number among those that are neither zero nor infinite, of equally frequent
    ones the larger; None if there is none.

    Example:
        >>> most_frequent([2.0, 1.0, 2.0, 0.0, 0.0, 0.0])
        2.0
    """
    counts = {value: count for value, count in Counter(values).items() if value and math.isfinite(value)}
    return max(counts, key=lambda value: (counts[value], value)) if counts else None


def scale_factor(up: np.ndarray, ratio: float, where: str) -> np.ndarray:
    """Returns ``up * ratio``: the same bytes if the ratio is 1 (to float32's precision), the same dtype if
    that is exact, else rounded once to float32.

    Raises:
        Unsupported: the product leaves the range of float32.
    """
    if abs(ratio - 1) <= 2.0**-24:
        return up
    exact = up.astype(np.float64) * ratio
    with np.errstate(over="ignore"):  # checked below
        kept, rounded = exact.astype(up.dtype), exact.astype(np.float32)
    if np.array_equal(kept.astype(np.float64), exact):
        return kept
    if not np.isfinite(rounded).all() or np.any((rounded == 0) & (exact != 0)):
        raise Unsupported(
            "the scale of this module cannot be written into its factor",
            where=where,
            found=f"factor {ratio:g}",
            expected="values within the range of float32",
            remedy="convert to peft and set one alpha",
        )
    return rounded
