"""Decodes quantized values (codes with a scale for each group) and requantizes changed values.

Formats differ in three things: the level that a code stands for (:class:`Levels`), which codes share a scale
(:class:`Groups`), and how scales are rounded for storage (``RoundScales``). Requantizing is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .plain import levels_of

Rows = np.ndarray
ScaleRows = tuple[Rows, Rows | None]
"""Scales and zero points."""
F32 = np.dtype(np.float32)


class QuantizedRows(NamedTuple):
    """Codes ``[n, m]``, and for each group ``[n / height, groups]`` its float32 scale and optional zero
    point.

    The zero point is a level to subtract before scaling, or, on a shifted grid, a number to add after
    scaling.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None


class CodeSpan(NamedTuple):
    """Evenly spaced levels: ``unit`` times a code, an integer from ``low`` to ``high``."""

    low: int
    high: int
    unit: float = 1.0


Fit = Callable[[Rows, Rows], ScaleRows]


class Levels(NamedTuple):
    """The numbers, before scaling, that codes stand for.

    ``value`` returns the float32 level of codes, ``nearest`` the code of the nearest level, ``fit`` a scale
    and zero point for groups with given least and greatest values, and ``width`` the gap between neighbouring
    levels at codes. Operators on codes support two kinds of levels: a ``span``, and a ``table`` in which a
    code is an index.
    """

    value: Callable[[np.ndarray], Rows]
    nearest: Callable[[Rows], np.ndarray]
    fit: Fit
    width: Callable[[np.ndarray], Rows]
    span: CodeSpan | None = None
    table: np.ndarray | None = None


class Groups(NamedTuple):
    """Which codes share a scale: ``width`` columns (the last group may have fewer) by ``height`` rows.

    ``members`` is the group of each column, if a group's columns are not adjacent.
    """

    width: int
    height: int = 1
    members: np.ndarray | None = None

    def per_code(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the entry of ``values`` for each code's group."""
        rows, columns = shape
        if self.height > 1:
            values = np.repeat(values, self.height, axis=0)[:rows]
        if self.members is not None:
            return values[:, self.members]
        return values if values.shape[1] == 1 else np.repeat(values, self.width, axis=1)[:, :columns]

    def reduce(self, values: Rows, ufunc: np.ufunc) -> Rows:
        """Reduces every group by ``ufunc``; sums are float32 within a row of a group, then float64."""
        count = -(-values.shape[1] // self.width)
        if self.members is not None:
            order = np.argsort(self.members, kind="stable")
            values = values[:, order]
            starts = np.searchsorted(self.members[order], np.arange(int(self.members.max()) + 1))
            reduced = ufunc.reduceat(values, starts, axis=1)
        elif count * self.width == values.shape[1]:
            reduced = ufunc.reduce(values.reshape(len(values), count, self.width), axis=2)
        else:
            reduced = ufunc.reduceat(values, np.arange(0, values.shape[1], self.width), axis=1)
        return (
            reduced
            if self.height == 1
            else ufunc.reduceat(reduced, np.arange(0, len(values), self.height), axis=0)
        )


RoundScales = Callable[[Rows, "Rows | None"], ScaleRows]
"""Rounds scales and zero points to values that the format can store."""


class Grid(NamedTuple):
    """A format's levels and groups.

    ``shifted`` means that zero points are added after scaling. ``joint`` adjacent groups keep their scales,
    or get new ones, together, because their scales are stored as multiples of one number.
    """

    levels: Levels
    groups: Groups
    shifted: bool = False
    joint: int = 1

    def decode(self, quantized: QuantizedRows) -> Rows:
        """Returns the values in float32: ``scale * (level - zero)``, or ``scale * level + zero`` on a shifted
        grid.
        """
        level = self.levels.value(quantized.codes)
        if quantized.zero is not None and not self.shifted:
            level = level - self.groups.per_code(quantized.zero, level.shape)
        decoded: Rows = level * self.groups.per_code(quantized.scale, level.shape)
        return (
            decoded
            if quantized.zero is None or not self.shifted
            else decoded + self.groups.per_code(quantized.zero, level.shape)
        )

    def encode(
        self, values: Rows, before: Rows, stored: QuantizedRows, round_scales: RoundScales | None
    ) -> QuantizedRows:
        """Returns codes for ``values``, where ``before`` is what ``stored`` decodes to.

        Each group keeps its scale, or takes one fitted to its new values if that reduces the squared error. A
        value that did not change keeps its code unless its group's scale changes, so weights that no adapter
        changes keep their bytes. Without ``round_scales``, all scales are kept.
        """
        best = self._nearest_codes(values, stored.scale, stored.zero)
        best = best._replace(codes=np.where(values == before, stored.codes, best.codes))
        if round_scales is None:
            return best
        # Try a scale fitted to the new values, and take it where it has the smaller error.
        error = self._joint(self._error(values, best))
        scale, point = self.levels.fit(
            self.groups.reduce(values, np.minimum), self.groups.reduce(values, np.maximum)
        )
        with np.errstate(all="ignore"):
            scale, point = round_scales(scale, point)
        other = self._nearest_codes(values, np.where(np.isfinite(scale), scale, stored.scale), point)
        # Comparing with NaN is false, so a group whose error is NaN keeps its scale.
        better = self._joint(self._error(values, other)) < error
        if not better.any():
            return best
        zero = None if best.zero is None or other.zero is None else np.where(better, other.zero, best.zero)
        codes = np.where(self.groups.per_code(better, values.shape), other.codes, best.codes)
        return QuantizedRows(codes, np.where(better, other.scale, best.scale), zero)

    def noise(self, quantized: QuantizedRows) -> float:
        """Returns the expected squared error of rounding to this grid: ``width^2 / 12`` for each code, times
        its scale squared.
        """
        square = self.levels.width(quantized.codes) ** 2
        by_group = self.groups.reduce(np.broadcast_to(square, quantized.codes.shape), np.add)
        return float(np.sum(by_group * quantized.scale.astype(np.float64) ** 2)) / 12

    def _nearest_codes(self, values: Rows, scale: Rows, zero: Rows | None) -> QuantizedRows:
        """Returns the codes nearest to the values for given scales and zero points."""
        # A scale of zero, or a tiny one, may overflow here; its large error rules it out.
        with np.errstate(all="ignore"):
            if zero is not None and self.shifted:
                values = values - self.groups.per_code(zero, values.shape)
            level = values / self.groups.per_code(scale, values.shape)
            if zero is not None and not self.shifted:
                level += self.groups.per_code(zero, values.shape)
        return QuantizedRows(
            self.levels.nearest(np.nan_to_num(level, copy=False, posinf=1e30, neginf=-1e30)), scale, zero
        )

    def _error(self, values: Rows, quantized: QuantizedRows) -> Rows:
        """Returns the squared error of each group."""
        with np.errstate(all="ignore"):
            return self.groups.reduce(np.square(self.decode(quantized) - values), np.add)

    def _joint(self, error: Rows) -> Rows:
        """Returns, for each group, the error summed over the groups that are decided together."""
        if self.joint == 1:
            return error
        return np.repeat(error.reshape(len(error), -1, self.joint).sum(axis=2), self.joint, axis=1)


def fit_magnitude(reach: float, zero: float | None = None) -> Fit:
    """Returns a fit that scales the greatest magnitude of a group to ``reach``, with a constant zero point.

    Example:
        >>> fit_magnitude(4)(np.float32([-8]), np.float32([2]))[0].tolist()
        [2.0]
    """

    def fit(least: Rows, greatest: Rows) -> ScaleRows:
        scale = np.maximum(np.abs(least), np.abs(greatest)) / F32.type(reach)
        return scale, None if zero is None else np.full_like(scale, zero)

    return fit


def integers(low: int, high: int, dtype: Any, zero_range: tuple[int, int] | None = None) -> Levels:
    """Returns the levels ``low .. high``; ``zero_range`` bounds the zero point of a fit, None keeps it at
    zero.

    Example:
        >>> eight = integers(-127, 127, np.int8)
        >>> eight.nearest(np.float32([1.4, -300])).tolist(), eight.fit(np.float32([-2.54]),
        ...     np.float32([1]))[0].tolist()
        ([1, -127], [0.019999999552965164])
    """

    def nearest(level: Rows) -> np.ndarray:
        codes: np.ndarray = np.clip(np.rint(level), low, high).astype(dtype)
        return codes

    def fit_range(least: Rows, greatest: Rows) -> ScaleRows:
        """Fits a scale and a zero point within ``zero_range``."""
        assert zero_range is not None
        least = np.minimum(least, 0)
        greatest = np.maximum(greatest, 0)
        scale = (greatest - least) / F32.type(high - low)
        with np.errstate(all="ignore"):
            zero = np.clip(np.rint(np.nan_to_num(low - least / scale)), *zero_range)
        return scale, zero.astype(np.float32)

    return Levels(
        lambda codes: codes.astype(np.float32),
        nearest,
        fit_magnitude(min(high, -low) if low else high) if zero_range is None else fit_range,
        lambda codes: np.ones((1, 1), np.float32),
        CodeSpan(low, high),
    )


def fixed_zero(levels: Levels, zero: float) -> Levels:
    """Returns evenly spaced ``levels`` with a constant zero point, as in symmetric formats that store one."""
    assert levels.span is not None
    return levels._replace(fit=fit_magnitude(min(levels.span.high - zero, zero - levels.span.low), zero))


def table(values: np.ndarray) -> Levels:
    """Returns the levels of a table ``[n]`` with greatest magnitude one; a code is an index into it.

    Example:
        >>> table(np.float32([-1, 0, 0.5, 1])).nearest(np.float32([0.2, 0.3, 9])).tolist()
        [1, 2, 3]
    """
    order = np.argsort(values, kind="stable")
    ascending = values[order].astype(np.float32)
    bounds = (ascending[:-1] + ascending[1:]) / 2
    gaps = np.diff(ascending, prepend=ascending[:1], append=ascending[-1:])
    half = (gaps[:-1] + gaps[1:]) / 2
    half[[0, -1]] *= 2
    width = np.empty_like(half)
    width[order] = half
    codes = order.astype(np.uint8)

    return Levels(
        lambda at: values[at].astype(np.float32, copy=False),
        lambda level: codes[np.searchsorted(bounds, level)],
        fit_magnitude(1),
        lambda at: width[at],
        table=values,
    )


def small_floats(dtype: np.dtype[Any], greatest: float) -> Levels:
    """Returns the numbers of a float dtype, such as float8, up to ``greatest`` in magnitude."""
    top = F32.type(greatest)
    info = ml_dtypes.finfo(dtype)

    def nearest(level: Rows) -> np.ndarray:
        codes: np.ndarray = np.clip(level, -top, top).astype(dtype)
        return codes

    def width(codes: np.ndarray) -> Rows:
        """Returns the gap at ``|x| = m 2^e``, m in [1/2, 1), with ``nmant`` bits of fraction: ``2^(e - 1 -
        nmant)``, and the smallest gap near zero.
        """
        _, exponent = np.frexp(codes.astype(np.float32))
        gap: Rows = np.maximum(
            np.ldexp(F32.type(1), exponent - 1 - info.nmant), F32.type(info.smallest_subnormal)
        )
        return gap

    return Levels(
        lambda codes: levels_of(dtype)[codes.view(np.uint8)], nearest, fit_magnitude(greatest), width
    )
