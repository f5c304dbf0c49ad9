"""The largest singular values and vectors of a matrix that is seen by blocks of rows, with what is left out known exactly.

A random range finder grown by blocks until it holds what was asked for (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1). Each
block is the best part of a Krylov space, of all that was seen on the way through ``D D^T`` and not of the last step alone (Musco and Musco
2015): for as many passes the error is within 1e-5 of the least, where it was within 4e-4. The approximation ``Q Q^T D`` is a projection,
so its error is ``||D||_F^2 - ||Q^T D||_F^2``: both are sums over all entries, and the error is no estimate. Cost a few ``m n k``; beside
one block of rows the memory is ``O((m + n) k)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from ..methods import row_blocks
from .cut import Cut, energy_of
from .space import Factors
from .spectra import Loss, Spectrum, frames

_SMALL = 64
"""Matrices of a side up to this are decomposed whole."""
_FIRST, _POWER = 24, 2
"""Directions of the first block (each next one doubles all), and how often a block goes through ``D D^T`` to turn to the largest ones."""
_MORE = 8
"""Directions beyond a wanted rank, so that the last ones that are kept are as good as the first."""


class Rows(Protocol):
    """A matrix by blocks of rows: anything with a shape that can be gone through again and again."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        ...

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Every row once, in order: (rows, ``D[rows]``) in float32 or float64; a block is good until the next one."""
        ...


class Held(NamedTuple):
    """A matrix in memory as :class:`Rows`."""

    matrix: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """See :class:`Rows`."""
        for block in row_blocks(*self.shape, 1 << 20):
            yield block, self.matrix[block]


class Found(NamedTuple):
    """The largest singular values of ``D`` with their vectors, and ``total = ||D||_F^2``, over all entries, in float64.

    ``whole``: the spectrum is all of it, not the beginning.
    """

    spectrum: Spectrum
    total: float
    whole: bool

    @property
    def left_out(self) -> float:
        """``||D||_F^2 - sum S^2``: the squared error of the approximation that keeps all of the spectrum; exact to rounding."""
        return max(0.0, self.total - energy_of(self.spectrum.S))

    def cut(self, cut: Cut) -> tuple[Factors, Loss]:
        """The best approximation of ``D`` that ``cut`` allows among what was found, and the loss against all of ``D``."""
        kept = cut.kept(self.spectrum.S, self.total)
        factors, inside = self.spectrum.cut(kept)
        return factors, Loss(inside.tail + self.left_out, self.total)


def largest(D: Rows, cut: Cut, *, noise: float = 0.0, seed: int = 0) -> Found:
    """The singular values of ``D``, largest first, until they are enough for ``cut`` or all that is left is ``noise`` (squared norm).

    With neither a rank nor a criterion in ``cut``, until what is left is noise. sv_ratio and sv_cumulative need the whole spectrum, which
    is found where they are asked for.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> low = rng.standard_normal((300, 5)) @ rng.standard_normal((5, 200))
        >>> found = largest(Held(low), Cut(energy=1 - 1e-12))
        >>> int(np.sum(found.spectrum.S > 1e-9 * found.spectrum.S[0])), found.left_out < 1e-9 * found.total
        (5, True)
    """
    m, n = D.shape
    side = min(m, n)
    limit = side if cut.rank is None else min(side, cut.rank + _MORE)
    if side <= _SMALL or cut.sv_ratio is not None or cut.sv_cumulative is not None:
        return _whole(D)
    total = _total(D)
    if total <= noise or total == 0:
        return Found(Spectrum(np.zeros((m, 0), np.float32), np.zeros(0), np.zeros((n, 0), np.float32)), total, False)
    share = cut.energy if cut.energy is not None else cut.sv_fro**2 if cut.sv_fro is not None else 1.0
    wanted = min(share * total, total - noise)
    rng = np.random.default_rng(seed)
    Q, found = np.zeros((m, 0), np.float32), np.zeros((n, 0), np.float32)  # found = D^T Q
    step = min(limit, _FIRST)
    while Q.shape[1] < limit and energy_of(np.linalg.norm(found.astype(np.float64), axis=0)) < wanted * (1 - 1e-7):
        if 2 * (Q.shape[1] + (_POWER + 1) * step) > side:
            return _whole(D)
        blocks = [_orthogonal(_without(_times(D, rng.standard_normal((n, step), np.float32)), Q))]
        for _ in range(_POWER):
            blocks.append(_orthogonal(_without(_times(D, _orthogonal(_turned_times(D, blocks[-1]))), Q)))
        basis = _orthogonal(_without(np.concatenate(blocks, axis=1), Q))
        if Q.shape[1]:
            basis = _orthogonal(_without(basis, Q))
        seen = _turned_times(D, basis)
        largest_of = np.linalg.eigh((seen.T @ seen).astype(np.float64))[1][:, : -step - 1 : -1].astype(np.float32)
        Q, found = np.concatenate([Q, basis @ largest_of], axis=1), np.concatenate([found, seen @ largest_of], axis=1)
        step = min(limit, 2 * Q.shape[1]) - Q.shape[1]
    v, values, turn = np.linalg.svd(found.astype(np.float64), full_matrices=False)
    return Found(_signed(Q @ turn.T.astype(Q.dtype), values, v.astype(found.dtype)), total, False)


def residual(D: Rows, factors: Factors) -> Loss:
    """``||D - B A||_F^2`` beside ``||D||_F^2``, entry by entry: what the factors as they are, rounded or not, leave out."""
    tail = total = 0.0
    for rows, block in D.blocks():
        total += _squares(block)
        tail += _squares(block - factors.rows(rows))
    return Loss(tail, total)


def _whole(D: Rows) -> Found:
    matrix = np.concatenate([block.astype(np.float64) for _, block in D.blocks()], axis=0)
    dtype = np.result_type(np.float32, next(block.dtype for _, block in D.blocks()))
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = int(np.count_nonzero(values > np.finfo(np.float64).eps * max(D.shape) * values[0])) if len(values) else 0
    return Found(_signed(u[:, :kept].astype(dtype), values[:kept], vt[:kept].T.astype(dtype)), _squares(matrix), True)


def _signed(U: np.ndarray, S: np.ndarray, V: np.ndarray) -> Spectrum:
    signs = np.where(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])] < 0, -1, 1) if len(S) else np.ones(0)
    return Spectrum(U * signs.astype(U.dtype), S, V * signs.astype(V.dtype))


def _total(D: Rows) -> float:
    return float(sum(_squares(block) for _, block in D.blocks()))


def _squares(block: np.ndarray) -> float:
    """The sum of the squares: rows in their own dtype, over rows in float64."""
    return float(np.sum(np.vecdot(block, block), dtype=np.float64))


def _times(D: Rows, X: np.ndarray) -> np.ndarray:
    product = np.empty((D.shape[0], X.shape[1]), np.float32)
    for rows, block in D.blocks():
        product[rows] = block @ X
    return product


def _turned_times(D: Rows, Y: np.ndarray) -> np.ndarray:
    product = np.zeros((D.shape[1], Y.shape[1]), np.float32)
    for rows, block in D.blocks():
        product += block.T @ Y[rows]
    return product


def _without(Y: np.ndarray, Q: np.ndarray) -> np.ndarray:
    return Y - Q @ (Q.T @ Y) if Q.shape[1] else Y


def _orthogonal(Y: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns."""
    frame, _ = frames(Y[None])
    Q: np.ndarray = frame.times(np.eye(Y.shape[1])[None])[0].astype(Y.dtype)
    return Q
