"""Sums up, in float64 over blocks, how much of a change survives rounding to the stored dtype."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...io import Json


def finite(value: float) -> float | None:
    """Replaces NaN and infinity, which JSON lacks, by None."""
    return value if math.isfinite(value) else None


class TensorLoss(NamedTuple):
    """The fold loss of one tensor, its bias included: Frobenius norms in float64.

    ``change`` is ``||D||`` of the exact change ``D``, ``error`` is ``||S - D||`` of the stored change ``S``,
    ``kept`` is ``<S, D> / ||D||^2``, and ``stored`` is ``||S||``. ``grid`` is for a quantized tensor the
    expected norm of the error of rounding to the grid of the base, ``sqrt(sum width^2 / 12)``: an estimate of
    what the base lost when it was quantized.
    """

    tensor: str
    dtype: str
    change: float
    error: float
    kept: float
    stored: float
    grid: float = 0.0

    @property
    def relative_error(self) -> float:
        """``||S - D|| / ||D||``; zero where nothing was to change."""
        return self.error / self.change if self.change else 0.0

    def to_json(self) -> Json:
        """Returns the loss as reports print it."""
        return {
            "tensor": self.tensor,
            "dtype": self.dtype,
            "relative_error": finite(self.relative_error),
            "kept": finite(self.kept),
        }


class LossSums(NamedTuple):
    """Over the elements of a tensor, for the exact change ``D`` and the rounding error ``E = S - D`` of the
    stored change ``S``: ``<D, D>``, ``<E, E>``, ``<E, D>``; whether any stored byte differs from the base's;
    and, of a quantized weight, the expected squared error of its grid. Sums of parts add up.
    """

    change: float = 0.0
    error: float = 0.0
    inner: float = 0.0
    moved: bool = False
    noise: float = 0.0

    def __add__(self, other: object) -> LossSums:
        if not isinstance(other, LossSums):
            return NotImplemented
        return LossSums(
            self.change + other.change,
            self.error + other.error,
            self.inner + other.inner,
            self.moved or other.moved,
            self.noise + other.noise,
        )

    def loss(self, tensor: str, dtype: str) -> TensorLoss:
        """Returns the loss of the tensor with these sums."""
        kept = 1 + self.inner / self.change if self.change else 1.0
        stored = math.sqrt(max(self.change + 2 * self.inner + self.error, 0.0)) if self.moved else 0.0
        if self.moved and stored == 0.0:
            stored = math.ulp(0.0)  # bytes differ, so the stored change is not zero
        return TensorLoss(
            tensor, dtype, math.sqrt(self.change), math.sqrt(self.error), kept, stored, math.sqrt(self.noise)
        )


def sums_of(change: np.ndarray, error: np.ndarray, moved: bool, *, energy: bool = True) -> LossSums:
    """Returns the sums of a block; without ``energy`` leaves out ``<D, D>``, which the caller knows for the
    full tensor.
    """
    return LossSums(
        inner(change, change) if energy else 0.0, inner(error, error), inner(error, change), moved
    )


def inner(a: np.ndarray, b: np.ndarray) -> float:
    """``<a, b>``: row by row, so that float32 sums stay short and BLAS starts no threads of its own, then
    over rows in float64.
    """
    return float(np.sum(np.vecdot(a, b), dtype=np.float64))
