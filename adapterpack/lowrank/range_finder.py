"""Finds the largest singular values and vectors of a matrix that is read in blocks of rows, with the exact
size of the remainder.

It is a range finder that adds blocks of directions until it reaches the requested rank or error (Halko,
Martinsson and Tropp 2011, algorithms 4.4 and 5.1). Each block is the best part of a Krylov space: of all
images under powers of ``D^T D``, not only the last one (Musco and Musco 2015). Its first directions are
random, or known ones: the rows of a merged change lie close to those of the adapters it was made from, which
saves one step in three. Each step is one pass over ``D``. The approximation ``D V V^T`` is a projection, so
its squared error is exactly ``||D||_F^2 - ||D V||_F^2``, where both terms are sums over all entries. It
exceeds the smallest possible error by a relative 1e-7, or 1e-6 where the singular values decay slowly. The
cost is a few ``m n k``; apart from one block of rows the memory is ``O((m + n) k)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..adapter_methods import row_blocks
from .factors import Factors, RowBlocks, Side
from .spectra import Loss, Spectrum, frames
from .truncation import Cut, energy_of

_SMALL = 64
"""Matrices with a side up to this size are decomposed in full."""
_FIRST = 24
"""The number of directions in the first block; each further block doubles the total."""
_STEPS, _STEPS_FROM_GUESS = 3, 2
"""How many times a block is multiplied by ``D^T D`` to align it with the largest directions, from random and
from known starting directions.
"""
_MORE = 8
"""Directions computed beyond the requested rank, so that the last kept ones are as accurate as the first."""
_ROWS = 1 << 19
"""Numbers per block of a matrix in memory: small enough for one core's cache, large enough that the overhead
of a call does not matter.
"""


class RowSource(Protocol):
    """A matrix that can be read repeatedly in blocks of rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        ...

    @property
    def guess(self) -> np.ndarray | None:
        """Known directions ``[n, k]`` near which the rows lie, or None; a longer vector says that more of
        ``D`` is expected along it.
        """
        ...

    def blocks(self) -> RowBlocks:
        """Yields every row once, in order, as (rows, ``D[rows]``) in float32 or float64; a block may be
        overwritten when the next one is requested.
        """
        ...


class InMemory(NamedTuple):
    """A matrix in memory as a :class:`RowSource`."""

    matrix: np.ndarray
    guess: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def blocks(self) -> RowBlocks:
        """Yields blocks of rows, each with its slice."""
        for block in row_blocks(*self.shape, _ROWS):
            yield block, self.matrix[block]


class LeadingSpectrum(NamedTuple):
    """The largest singular values of ``D`` with their vectors, and ``total = ||D||_F^2`` over all entries, in
    float64.

    ``whole``: the spectrum is complete.
    """

    spectrum: Spectrum
    total: float
    whole: bool

    @property
    def left_out(self) -> float:
        """``||D||_F^2 - sum S^2``: the squared error of the approximation that keeps the entire spectrum;
        exact up to rounding.
        """
        return max(0.0, self.total - energy_of(self.spectrum.S))

    def cut(self, cut: Cut) -> tuple[Factors, Loss]:
        """Returns the best approximation of ``D`` that ``cut`` allows within the computed spectrum, and its
        loss relative to all of ``D``.
        """
        kept = cut.kept(self.spectrum.S, self.total)
        factors, inside = self.spectrum.cut(kept)
        return factors, Loss(inside.tail + self.left_out, self.total)


def largest(D: RowSource, cut: Cut, *, noise: float = 0.0, seed: int = 0) -> LeadingSpectrum:
    """Computes the largest singular values of ``D`` until they satisfy ``cut`` or the remainder is at most
    ``noise`` (squared norm).

    Without a rank and a criterion in ``cut`` it continues until the remainder is noise. sv_ratio and
    sv_cumulative need the complete spectrum, which is then computed.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> low = rng.standard_normal((300, 5)) @ rng.standard_normal((5, 200))
        >>> leading = largest(InMemory(low), Cut(energy=1 - 1e-12))
        >>> (int(np.sum(leading.spectrum.S > 1e-9 * leading.spectrum.S[0])),
        ...     leading.left_out < 1e-7 * leading.total)
        (5, True)
    """
    m, n = D.shape
    side = min(m, n)
    limit = side if cut.rank is None else min(side, cut.rank + _MORE)
    if side <= _SMALL or cut.sv_ratio is not None or cut.sv_cumulative is not None:
        return _whole(D)
    total = float(sum(_squares(block) for _, block in D.blocks()))
    if total <= noise or total == 0:
        return LeadingSpectrum(
            Spectrum(np.zeros((m, 0), np.float32), np.zeros(0), np.zeros((n, 0), np.float32)), total, False
        )
    share = cut.energy if cut.energy is not None else cut.sv_fro**2 if cut.sv_fro is not None else 1.0
    wanted = min(share * total, total - noise)
    rng = np.random.default_rng(seed)
    # `V` collects orthonormal directions, and `Y` their images, whose squared norm is the captured energy.
    V, Y = np.zeros((n, 0), np.float32), np.zeros((m, 0), np.float32)  # Y = D V
    step = min(limit, _FIRST)
    while V.shape[1] < limit and _squares(Y) < wanted * (1 - 1e-7):
        guess = _drawn_from(None if V.shape[1] else D.guess, n, 2 * step, rng)
        start, steps = guess, _STEPS_FROM_GUESS
        if guess.shape[1] < step:
            start = np.concatenate(
                [guess, rng.standard_normal((n, step - guess.shape[1]), np.float32)], axis=1
            )
            steps = _STEPS
        # With so many directions a full decomposition costs less.
        if 2 * (V.shape[1] + steps * start.shape[1]) > side:
            return _whole(D)
        _, turned = _there_and_back(D, start)
        basis, images = [V], [Y]
        for left in reversed(range(steps)):
            basis.append(_new_directions(turned, basis))
            image, turned = _there_and_back(D, basis[-1], back=left > 0)
            images.append(image)
        # Keep only the best `step` directions of the block's Krylov space.
        best = _turn(images[1:], step)
        V = np.concatenate([V, _multiply_parts(basis[1:], best)], axis=1)
        Y = np.concatenate([Y, _multiply_parts(images[1:], best)], axis=1)
        step = min(limit, 2 * V.shape[1]) - V.shape[1]
    frame, core = frames([Side((Y,), (1.0,))])
    u, values, turn = np.linalg.svd(core[0])
    return LeadingSpectrum(
        _fix_signs(frame.times(u[None])[0].astype(Y.dtype), values, V @ turn.T.astype(V.dtype)), total, False
    )


def _there_and_back(D: RowSource, X: np.ndarray, back: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``D X``, and with ``back`` also ``D^T D X``, in one pass over the blocks of ``D``; float32."""
    image = np.empty((D.shape[0], X.shape[1]), np.float32)
    returned = np.zeros(X.shape, np.float32)
    for rows, block in D.blocks():
        np.matmul(block, X, out=image[rows])
        if back:
            returned += block.T @ image[rows]
    return image, returned


def residual(D: RowSource, factors: Factors) -> Loss:
    """Returns ``||D - B A||_F^2`` and ``||D||_F^2``, computed entry by entry: the exact loss of the given
    factors, including their rounding.
    """
    tail = total = 0.0
    for rows, block in D.blocks():
        total += _squares(block)
        tail += _squares(block - factors.rows(rows))
    return Loss(tail, total)


def _whole(D: RowSource) -> LeadingSpectrum:
    parts = [(block.dtype, block.astype(np.float64)) for _, block in D.blocks()]
    matrix = np.concatenate([part for _, part in parts], axis=0)
    dtype = np.result_type(np.float32, parts[0][0])
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = (
        int(np.count_nonzero(values > np.finfo(np.float64).eps * max(D.shape) * values[0]))
        if len(values)
        else 0
    )
    return LeadingSpectrum(
        _fix_signs(u[:, :kept].astype(dtype), values[:kept], vt[:kept].T.astype(dtype)),
        _squares(matrix),
        True,
    )


def _fix_signs(U: np.ndarray, S: np.ndarray, V: np.ndarray) -> Spectrum:
    signs = np.where(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])] < 0, -1, 1) if len(S) else np.ones(0)
    return Spectrum(U * signs.astype(U.dtype), S, V * signs.astype(V.dtype))


def _squares(block: np.ndarray) -> float:
    """Returns the sum of the squares: within a row in the row's dtype, over rows in float64."""
    return float(np.sum(np.vecdot(block, block), dtype=np.float64))


def _drawn_from(guess: np.ndarray | None, n: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the known directions ``[n, k]``, or ``most`` random combinations of them if there are more."""
    if guess is None:
        return np.zeros((n, 0), np.float32)
    return (
        guess if guess.shape[1] <= most else guess @ rng.standard_normal((guess.shape[1], most), np.float32)
    )


def _new_directions(W: np.ndarray, bases: Sequence[np.ndarray]) -> np.ndarray:
    """Returns an orthonormal basis of what ``W`` adds to the orthonormal ``bases``, with as many columns as
    ``W`` even if ``W`` adds less.
    """
    present = [V for V in bases if V.shape[1]]
    left = W
    again = 0.0
    for turn in range(
        2
    ):  # a second projection: the remainder may be small, and its rounding errors large relative to it
        for V in present:
            inside = V.T @ left
            left = left - V @ inside
            again += float(turn) * np.sum(inside**2, axis=0)
    frame, core = frames([Side((left,), (1.0,))])
    if not present or (frame.back is not None and (np.sum(core[0] ** 2, axis=0) > again).all()):
        columns: np.ndarray = frame.times(np.eye(W.shape[1])[None])[0]
        return columns.astype(W.dtype)
    # Some column adds nothing, and its remainder is rounding error inside the old span. Householder's QR
    # still returns orthonormal columns.
    whole = np.linalg.qr(np.concatenate([*present, W], axis=1).astype(np.float64))[0][:, -W.shape[1] :]
    return whole.astype(W.dtype)


def _turn(images: Sequence[np.ndarray], kept: int) -> np.ndarray:
    """Returns the coordinates ``[k, kept]`` of the largest directions in the joint columns of the images."""
    products = np.concatenate(
        [np.concatenate([left.T @ right for right in images], axis=1) for left in images], axis=0
    )
    directions: np.ndarray = np.linalg.eigh(products.astype(np.float64))[1][:, : -kept - 1 : -1].astype(
        np.float32
    )
    return directions


def _multiply_parts(parts: Sequence[np.ndarray], turn: np.ndarray) -> np.ndarray:
    """``concatenate(parts, axis=1) @ turn`` without the concatenation."""
    shares = np.split(turn, np.cumsum([part.shape[1] for part in parts])[:-1])
    products = (part @ share for part, share in zip(parts, shares, strict=True))
    total: np.ndarray = sum(products)  # type: ignore[assignment]
    return total
