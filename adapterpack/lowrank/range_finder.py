"""Finds the largest singular values and vectors of a matrix read by blocks of rows, with the exact size of
what is left out.

A range finder that grows by blocks until it reaches the wanted rank or error (Halko, Martinsson and Tropp
2011, algorithms 4.4 and 5.1). A block is the best part of a Krylov space: of all images on the way through
``D^T D``, not of the last one alone (Musco and Musco 2015). Its first directions are random, or those that
are known: the rows of a merged change lie near those of the adapters it was made of, which saves a step of
three. One pass over ``D`` makes a step. The approximation ``D V V^T`` is a projection, so its error is
``||D||_F^2 - ||D V||_F^2``: both are sums over all entries, and the error is no estimate. It exceeds the
least one by 1e-7 of it, or 1e-6 where the values fall slowly. Cost a few ``m n k``; apart from one block of
rows the memory is ``O((m + n) k)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..adapter_methods import row_blocks
from .factors import Factors, Side
from .spectra import Loss, Spectrum, frames
from .truncation import Cut, energy_of

_SMALL = 64
"""Matrices of a side up to this are decomposed whole."""
_FIRST = 24
"""Directions of the first block; each next one doubles all."""
_STEPS, _STEPS_FROM_GUESS = 3, 2
"""How often a block goes through ``D^T D`` to turn to the largest directions, from random ones and from those
that are known.
"""
_MORE = 8
"""Directions beyond a wanted rank, so that the last ones that are kept are as good as the first."""
_ROWS = 1 << 19
"""Numbers of a block of a matrix in memory: it stays in a core's own cache, and a call takes long enough not
to wait for the next.
"""


class RowSource(Protocol):
    """A matrix by blocks of rows: anything with a shape that can be gone through again and again."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        ...

    @property
    def guess(self) -> np.ndarray | None:
        """``[n, k]``: directions near which the rows lie, where some are known; the longer, the more of ``D``
        is expected there.
        """
        ...

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Every row once, in order: (rows, ``D[rows]``) in float32 or float64; a block is good until the next
        one.
        """
        ...


class InMemory(NamedTuple):
    """A matrix in memory as :class:`RowSource`."""

    matrix: np.ndarray
    guess: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Blocks of rows, each with its place."""
        for block in row_blocks(*self.shape, _ROWS):
            yield block, self.matrix[block]


class LeadingSpectrum(NamedTuple):
    """The largest singular values of ``D`` with their vectors, and ``total = ||D||_F^2``, over all entries,
    in float64.

    ``whole``: the spectrum is all of it, not the beginning.
    """

    spectrum: Spectrum
    total: float
    whole: bool

    @property
    def left_out(self) -> float:
        """``||D||_F^2 - sum S^2``: the squared error of the approximation that keeps all of the spectrum;
        exact to rounding.
        """
        return max(0.0, self.total - energy_of(self.spectrum.S))

    def cut(self, cut: Cut) -> tuple[Factors, Loss]:
        """The best approximation of ``D`` that ``cut`` allows among what was found, and the loss against all
        of ``D``.
        """
        kept = cut.kept(self.spectrum.S, self.total)
        factors, inside = self.spectrum.cut(kept)
        return factors, Loss(inside.tail + self.left_out, self.total)


def largest(D: RowSource, cut: Cut, *, noise: float = 0.0, seed: int = 0) -> LeadingSpectrum:
    """The singular values of ``D``, largest first, until they are enough for ``cut`` or all that is left is
    ``noise`` (squared norm).

    With neither a rank nor a criterion in ``cut``, until what is left is noise. sv_ratio and sv_cumulative
    need the whole spectrum, which is computed for them.

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
    V, Y = np.zeros((n, 0), np.float32), np.zeros((m, 0), np.float32)  # Y = D V
    step = min(limit, _FIRST)
    while V.shape[1] < limit and _squares(Y) < wanted * (1 - 1e-7):
        guess = _drawn_from(None if V.shape[1] else D.guess, n, 2 * step, rng)
        start, steps = guess, _STEPS_FROM_GUESS
        if guess.shape[1] < step:
            start, steps = (
                np.concatenate([guess, rng.standard_normal((n, step - guess.shape[1]), np.float32)], axis=1),
                _STEPS,
            )
        if 2 * (V.shape[1] + steps * start.shape[1]) > side:
            return _whole(D)
        _, turned = _there_and_back(D, start)
        basis, images = [V], [Y]
        for left in reversed(range(steps)):
            basis.append(_new_directions(turned, basis))
            image, turned = _there_and_back(D, basis[-1], back=left > 0)
            images.append(image)
        best = _turn(images[1:], step)
        V, Y = (
            np.concatenate([V, _multiply_parts(basis[1:], best)], axis=1),
            np.concatenate([Y, _multiply_parts(images[1:], best)], axis=1),
        )
        step = min(limit, 2 * V.shape[1]) - V.shape[1]
    frame, core = frames([Side((Y,), (1.0,))])
    u, values, turn = np.linalg.svd(core[0])
    return LeadingSpectrum(
        _fix_signs(frame.times(u[None])[0].astype(Y.dtype), values, V @ turn.T.astype(V.dtype)), total, False
    )


def _there_and_back(D: RowSource, X: np.ndarray, back: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """``D X``, and with ``back`` ``D^T D X``, in one pass over the blocks of ``D``; float32."""
    image, returned = np.empty((D.shape[0], X.shape[1]), np.float32), np.zeros(X.shape, np.float32)
    for rows, block in D.blocks():
        np.matmul(block, X, out=image[rows])
        if back:
            returned += block.T @ image[rows]
    return image, returned


def residual(D: RowSource, factors: Factors) -> Loss:
    """``||D - B A||_F^2`` and ``||D||_F^2``, entry by entry: what the factors as they are, rounded or not,
    leave out.
    """
    tail = total = 0.0
    for rows, block in D.blocks():
        total += _squares(block)
        tail += _squares(block - factors.rows(rows))
    return Loss(tail, total)


def _whole(D: RowSource) -> LeadingSpectrum:
    matrix = np.concatenate([block.astype(np.float64) for _, block in D.blocks()], axis=0)
    dtype = np.result_type(np.float32, next(block.dtype for _, block in D.blocks()))
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
    """The sum of the squares: rows in their own dtype, over rows in float64."""
    return float(np.sum(np.vecdot(block, block), dtype=np.float64))


def _drawn_from(guess: np.ndarray | None, n: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """``[n, k]``: the directions that are known; of too many, as many random sums of them."""
    if guess is None:
        return np.zeros((n, 0), np.float32)
    return (
        guess if guess.shape[1] <= most else guess @ rng.standard_normal((guess.shape[1], most), np.float32)
    )


def _new_directions(W: np.ndarray, bases: Sequence[np.ndarray]) -> np.ndarray:
    """An orthonormal basis of what ``W`` adds to orthonormal ones; of as many columns as ``W``, whatever it
    adds.
    """
    present = [V for V in bases if V.shape[1]]
    left, again = W, 0.0
    for turn in range(2):  # what is left may be small relative to W, and its rounding with it
        for V in present:
            inside = V.T @ left
            left = left - V @ inside
            again += float(turn) * np.sum(inside**2, axis=0)
    frame, core = frames([Side((left,), (1.0,))])
    if not present or (frame.back is not None and (np.sum(core[0] ** 2, axis=0) > again).all()):
        columns: np.ndarray = frame.times(np.eye(W.shape[1])[None])[0]
        return columns.astype(W.dtype)
    # Something adds nothing: what is left of it is rounding, and lies inside again. Householder's QR makes
    # orthonormal columns of anything.
    whole: np.ndarray = np.linalg.qr(np.concatenate([*present, W], axis=1).astype(np.float64))[0][
        :, -W.shape[1] :
    ]
    return whole.astype(W.dtype)


def _turn(images: Sequence[np.ndarray], kept: int) -> np.ndarray:
    """``[k, kept]``: the largest directions of images side by side, in their coordinates."""
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
