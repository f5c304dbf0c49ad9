"""Entrywise rules (class D) in any coordinates: of the dense change by blocks of rows, or of the small joint bases, where they are exact.

An entrywise rule looks at ``[T, rows, columns]``, the entries of all changes in some coordinates. In the coordinates of the weight the
result has no low rank and is seen by blocks of rows only; in the coordinates of the changes' joint bases it is an adapter as it stands.
The coordinates depend on the changes alone, up to signs, and every rule here treats ``x`` and ``-x`` alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..merge import lowrank
from ..methods import row_blocks
from . import passes
from .rule import Combined, with_scope
from .space import Core, Factors, Term, core

_BLOCK = 1 << 18
"""Numbers of a block of all changes together: what a core's cache holds a few times."""
_HELD = 1 << 22
"""Numbers that are held to select from: 16 MB."""


class Block(NamedTuple):
    """Some rows of all changes: ``values`` ``[T, b, n]``, and what tells them apart: weights ``[T]``, keys, and which ``rows`` they are.

    ``measured`` are the same rows of what was measured of each change, where something was.
    """

    values: np.ndarray
    weights: np.ndarray
    keys: tuple[str, ...]
    rows: slice
    measured: tuple[np.ndarray | None, ...] = ()

    @property
    def weighted(self) -> np.ndarray:
        """``w_t x_t``."""
        return weighted(self.weights, self.values)


def weighted(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``[T, b, n]``: the values times one number for each ``t``."""
    product: np.ndarray = values * weights[:, None, None].astype(values.dtype)
    return product


@dataclass(frozen=True)
class View:
    """The changes of one site in some coordinates: ``take`` gives rows ``[T, b, n]``, ``back`` brings a merged matrix to the weight."""

    terms: tuple[Term, ...]
    shape: tuple[int, int]
    take: Callable[[slice], np.ndarray]
    back: Callable[[np.ndarray], Factors] | None = None

    def blocks(self) -> Iterator[Block]:
        """All rows once, in blocks that depend on the shape alone."""
        weights, keys = np.array([term.weight for term in self.terms]), tuple(term.key for term in self.terms)
        for rows in row_blocks(*self.shape, max(1, _BLOCK // len(self.terms))):
            measured = tuple(None if term.measured is None else term.measured[rows] for term in self.terms)
            yield Block(self.take(rows), weights, keys, rows, measured)


Blocks = Callable[[], Iterator[Block]]
"""The blocks of one site or of all, as often as they are asked for."""


@dataclass(frozen=True)
class Merged:
    """A dense change that is made when it is looked at, as :class:`~adapterpack.compose.finder.Rows`."""

    view: View
    fuse: Callable[[Block], np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.view.shape

    @property
    def guess(self) -> np.ndarray | None:
        """The rows of the factors, as long as what each brings into the sum of the changes."""
        rows = [term.A.T * (abs(term.weight) * np.linalg.norm(term.B, axis=0)) for term in self.view.terms]
        return np.concatenate(rows, axis=1).astype(np.float32)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """See :class:`~adapterpack.compose.finder.Rows`."""
        for block in self.view.blocks():
            yield block.rows, self.fuse(block)


def dense(terms: Sequence[Term]) -> View:
    """The coordinates of the weight."""
    dtype, columns = np.result_type(*(part.dtype for term in terms for part in (term.A, term.B))), terms[0].change.shape[1]
    packed = [lowrank.panels(term.B, term.A) if dtype == np.float32 else None for term in terms]

    def take(rows: slice) -> np.ndarray:
        values = np.empty((len(terms), rows.stop - rows.start, columns), dtype)
        for value, term, panels in zip(values, terms, packed, strict=True):
            lowrank.product(term.B[rows], term.A, panels, value)
        return values

    return View(tuple(terms), terms[0].change.shape, take)


def knots(terms: Sequence[Term]) -> View:
    """KnOTS: ``[D_1 .. D_T] = U [X_1 .. X_T]``, the coordinates of the columns in the left singular vectors of all changes side by side.

    Source: arXiv 2410.19735, section 4.
    """
    found = core(terms)
    left = _directions(found.cores)
    X = (left.T @ found.cores @ found.right.T.astype(np.float64)).astype(found.left.dtype)
    basis = (found.left @ left).astype(found.left.dtype)
    return View(tuple(terms), X.shape[1:], lambda rows: X[:, rows], lambda merged: Factors(merged, basis))


def core_space(terms: Sequence[Term]) -> View:
    """Core Space: ``M_t = U^T D_t V`` with the bases of all columns and all rows, of the changes in balanced factors.

    Source: arXiv 2509.17786, section 3. The bases are singular vectors of the stacked factors, so the factors are balanced first:
    ``U sqrt(S)`` and ``sqrt(S) V^T`` are the same whichever way a change was written.
    """
    found = core(terms)
    u, s, vt = np.linalg.svd(found.cores, full_matrices=False)
    halves = np.sqrt(s)[:, None, :]
    left, right = _directions(u * halves), _directions(vt.transpose(0, 2, 1) * halves)
    M = (left.T @ found.cores @ right).astype(found.left.dtype)
    bases = (found.left @ left).astype(found.left.dtype), (found.right @ right).astype(found.right.dtype)
    return View(tuple(terms), M.shape[1:], lambda rows: M[:, rows], Core(*bases, M).change)


def _directions(parts: np.ndarray) -> np.ndarray:
    """``[K, k]``: the left singular vectors of ``[T, K, L]`` side by side, but for those that are rounding."""
    u, s, _ = np.linalg.svd(np.concatenate(list(parts), axis=1), full_matrices=False)
    found: np.ndarray = u[:, s > 16 * np.finfo(np.float32).eps * s[0]]
    return found


def entrywise(
    coordinates: Callable[[Sequence[Term]], View], fuse: Callable[..., np.ndarray], measure: Callable[..., Any], scope: str = "adapter"
) -> tuple[Callable[..., Combined], Callable[..., Any]]:
    """The function and the survey of a rule: ``measure(blocks, *, ...)`` sees all entries, then ``fuse(block, found, *, ...)`` merges them.

    ``fuse`` names the parameters; ``measure`` gets the same.
    """

    def function(terms: Sequence[Term], found: Any, **params: Any) -> Combined:
        params.pop("scope")
        view = coordinates(terms)
        made = Merged(view, lambda block: fuse(block, found, **params))
        return made if view.back is None else view.back(np.concatenate([values for _, values in made.blocks()], axis=0))

    def survey(sites: Sequence[Sequence[Term]], **params: Any) -> Any:
        params.pop("scope")
        changed = [terms for terms in sites if any(len(term.A) for term in terms)]
        return measure(lambda: (block for terms in changed for block in coordinates(terms).blocks()), **params)

    function.__signature__ = with_scope(fuse, scope)  # type: ignore[attr-defined]
    return function, survey


def magnitudes(values: np.ndarray) -> np.ndarray:
    """``|x|`` in float32, in which magnitudes are ranked."""
    found: np.ndarray = np.abs(values).astype(np.float32, copy=False)
    return found


def level(values: Callable[[], Iterator[np.ndarray]], share: float) -> np.ndarray:
    """``[C]``: of each of ``C`` rows of numbers, the magnitude that a ``share`` of them reaches or exceeds, exactly.

    ``values`` gives pieces ``[C, ...]``, the same ones each time; magnitudes are those of float32. Their bit patterns are counted, which
    are in their order: one pass counts the upper halves, one the lower halves inside the bin that was found. So memory is 98304
    counters a row, whatever the size. Without the compiled kernel a bearable number of them is held and selected from.

    Example:
        >>> piece = np.arange(10, dtype=np.float32)[None]
        >>> level(lambda: iter([piece[:, :4], -piece[:, 4:]]), 0.3)
        array([7.], dtype=float32)
    """
    if not passes.compiled() and (held := _held(values)) is not None:
        wanted = held.shape[1] - min(held.shape[1], max(1, round(share * held.shape[1])))
        return np.partition(held, wanted, axis=1)[:, wanted] if held.size else np.zeros(0, np.float32)
    high, sizes = np.zeros((0, passes.UPPER), np.int64), 0
    for piece in values():
        high, sizes = high if len(high) else np.zeros((len(piece), passes.UPPER), np.int64), sizes + piece[0].size
        for counts, row in zip(high, _rows(piece), strict=True):
            passes.count_upper(row, counts)
    wanted = min(sizes, max(1, round(share * sizes)))
    upper = [passes.reached(counts, wanted) for counts in high]
    low = np.zeros((len(high), passes.LOWER), np.int64)
    for piece in values():
        for counts, row, (found, _) in zip(low, _rows(piece), upper, strict=True):
            passes.count_lower(row, found, counts)
    bits = [found << 16 | passes.reached(counts, wanted - above)[0] for counts, (found, above) in zip(low, upper, strict=True)]
    return np.array(bits, np.uint32).view(np.float32)


def _held(values: Callable[[], Iterator[np.ndarray]]) -> np.ndarray | None:
    """All magnitudes, ``[C, ...]``, if they are few enough."""
    held: list[np.ndarray] = []
    for piece in values():
        held.append(magnitudes(piece).reshape(len(piece), -1))
        if sum(each.size for each in held) > _HELD:
            return None
    return np.concatenate(held, axis=1) if held else np.zeros((0, 0), np.float32)


def _rows(piece: np.ndarray) -> np.ndarray:
    """``[C, N]`` in float32, C-contiguous."""
    return np.ascontiguousarray(piece, np.float32).reshape(len(piece), -1)
