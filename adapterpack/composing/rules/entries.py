"""Applies entrywise rules (class D) to the dense changes by blocks of rows, or to the small joint bases where
the result is exact.

An entrywise rule looks at ``[T, rows, columns]``, the entries of all changes in some coordinates. In the
coordinates of the weight the result has no low rank and is computed in blocks of rows; in the coordinates of
the changes' joint bases the result has low rank and is an adapter already. The coordinates depend on the
changes alone, up to signs, and every rule here treats ``x`` and ``-x`` alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..._native import lowrank
from ...adapter_methods import row_blocks
from ...lowrank import Factors, JointCore, RowBlocks, Term, Terms
from ...lowrank.factors import core
from .rule import RULES, Combination, Function, Rule, with_scope

_BLOCK = 1 << 21
"""The numbers of a block of all changes together: 8 MB. A core's cache holds fewer, but with smaller blocks
threads wait for the interpreter's lock between short calls.
"""
_EVERY = (3, 5)
"""The steps between sampled rows and columns: odd numbers, because heads and the like have even widths."""


class EntryBlock(NamedTuple):
    """Some rows of all changes: ``values`` ``[T, b, n]``, the weights ``[T]`` and keys of the changes, and
    the indices ``rows``.

    ``measured`` holds the same rows of each change's statistics, and ``own`` the parameters that a change has
    for itself, if there are any.
    """

    values: np.ndarray
    weights: np.ndarray
    keys: tuple[str, ...]
    rows: slice
    measured: tuple[np.ndarray | None, ...] = ()
    own: tuple[Mapping[str, float], ...] = ()

    def each(self, name: str, value: float) -> np.ndarray:
        """Returns ``[T, 1, 1]``: a parameter's value for each change, its own or else ``value``."""
        return _each(self.own or ({},) * len(self.keys), name, value)[:, None, None]

    @property
    def weighted(self) -> np.ndarray:
        """Returns ``w_t x_t``."""
        return weigh(self.weights, self.values)

    @property
    def signed(self) -> np.ndarray:
        """Returns ``sgn(w_t) x_t``."""
        return weigh(np.sign(self.weights), self.values)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Returns the sum of ``w_t`` times these values."""
        return np.asarray(weigh(self.weights, values).sum(axis=0))


def _each(own: Sequence[Mapping[str, float]], name: str, value: float) -> np.ndarray:
    return np.array([values.get(name, value) for values in own])


def weigh(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Multiplies the values ``[T, b, n]`` by one number for each ``t``."""
    product: np.ndarray = values * weights[:, None, None].astype(values.dtype)
    return product


@dataclass(frozen=True)
class Coordinates:
    """The changes of one site in some coordinates: ``take`` returns rows ``[T, b, n]``, and ``back`` maps a
    merged matrix back to the coordinates of the weight.

    ``sample`` returns some entries ``[T, ...]`` from evenly spread rows and columns; it is set where that is
    much cheaper than computing all of them.
    """

    terms: tuple[Term, ...]
    shape: tuple[int, int]
    take: Callable[[slice], np.ndarray]
    back: Callable[[np.ndarray], Factors] | None = None
    sample: Callable[[], np.ndarray] | None = None

    def blocks(self) -> Iterator[EntryBlock]:
        """Yields all rows once, in blocks whose size depends on the shape alone."""
        weights = np.array([term.weight for term in self.terms])
        keys = tuple(term.key for term in self.terms)
        own = tuple(term.own for term in self.terms)
        for rows in row_blocks(*self.shape, max(1, _BLOCK // len(self.terms))):
            measured = tuple(None if term.measured is None else term.measured[rows] for term in self.terms)
            yield EntryBlock(self.take(rows), weights, keys, rows, measured, own)


@dataclass(frozen=True)
class EntryBlocks:
    """The blocks of one site or of all sites; a rule may iterate over them several times. ``terms`` are those
    of the first site.
    """

    views: Callable[[], Iterator[Coordinates]]
    terms: Terms

    def each(self, name: str, value: float) -> np.ndarray:
        """Returns ``[T]``: a parameter's value for each change, its own or else ``value``."""
        return _each([term.own for term in self.terms], name, value)

    def __call__(self) -> Iterator[EntryBlock]:
        """Yields all blocks once."""
        for view in self.views():
            yield from view.blocks()

    def sample(self) -> np.ndarray | None:
        """Returns sampled entries ``[T, S]``, or None where sampling would not be cheap."""
        parts = [
            view.sample().reshape(len(view.terms), -1) for view in self.views() if view.sample is not None
        ]
        return np.concatenate(parts, axis=1) if parts else None


@dataclass(frozen=True)
class MergedEntries:
    """A dense change that is recomputed at each use, as
    :class:`~adapterpack.lowrank.range_finder.RowSource`.
    """

    view: Coordinates
    fuse: Callable[[EntryBlock], np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.view.shape

    @property
    def guess(self) -> np.ndarray | None:
        """Returns the rows of the factors, scaled by the norm that each contributes to the sum of the
        changes.
        """
        rows = [term.A.T * (abs(term.weight) * np.linalg.norm(term.B, axis=0)) for term in self.view.terms]
        return np.concatenate(rows, axis=1).astype(np.float32)

    def blocks(self) -> RowBlocks:
        """Merges one block after another and yields its rows with the merged entries."""
        for block in self.view.blocks():
            yield block.rows, self.fuse(block)


def dense(terms: Terms) -> Coordinates:
    """Returns the coordinates of the weight itself."""
    changes = [term.change for term in terms]
    dtype = np.result_type(*(part.dtype for change in changes for part in change))
    m, n = changes[0].shape
    packed = [lowrank.panels(change.B, change.A) if dtype == np.float32 else None for change in changes]

    def take(rows: slice) -> np.ndarray:
        values = np.empty((len(terms), rows.stop - rows.start, n), dtype)
        for value, change, panels in zip(values, changes, packed, strict=True):
            lowrank.product(change.B[rows], change.A, panels, value)
        return values

    def sample() -> np.ndarray:
        return np.stack([change.B[:: _EVERY[0]] @ change.A[:, :: _EVERY[1]] for change in changes])

    return Coordinates(tuple(terms), (m, n), take, sample=sample)


def knots(terms: Terms) -> Coordinates:
    """Returns KnOTS' coordinates: ``[D_1 .. D_T] = U [X_1 .. X_T]``, the coordinates of the columns in the
    left singular vectors of all changes side by side.

    Source: arXiv 2410.19735, section 4.
    """
    joint = core(terms)
    left = _directions(joint.cores)
    X = (left.T @ joint.cores @ joint.right.T.astype(np.float64)).astype(joint.left.dtype)
    basis = (joint.left @ left).astype(joint.left.dtype)
    return Coordinates(
        tuple(terms), X.shape[1:], lambda rows: X[:, rows], lambda merged: Factors(merged, basis)
    )


def core_space(terms: Terms) -> Coordinates:
    """Returns Core Space's coordinates: ``M_t = U^T D_t V`` with the bases of all columns and all rows, of
    the changes in balanced factors.

    Source: arXiv 2509.17786, section 3. The bases are singular vectors of the stacked factors, so the factors
    are balanced first: ``U sqrt(S)`` and ``sqrt(S) V^T`` are the same whichever way a change was written.
    """
    joint = core(terms)
    u, s, vt = np.linalg.svd(joint.cores, full_matrices=False)
    halves = np.sqrt(s)[:, None, :]
    left = _directions(u * halves)
    right = _directions(vt.transpose(0, 2, 1) * halves)
    M = (left.T @ joint.cores @ right).astype(joint.left.dtype)
    bases = (joint.left @ left).astype(joint.left.dtype), (joint.right @ right).astype(joint.right.dtype)
    return Coordinates(tuple(terms), M.shape[1:], lambda rows: M[:, rows], JointCore(*bases, M).change)


def _directions(parts: np.ndarray) -> np.ndarray:
    """Returns ``[K, k]``: the left singular vectors of the ``[T, K, L]`` matrices side by side, without those
    that are only rounding.
    """
    u, s, _ = np.linalg.svd(np.concatenate(list(parts), axis=1), full_matrices=False)
    return u[:, s > 16 * np.finfo(np.float32).eps * s[0]]


def entry_rule(
    name: str,
    summary: str,
    *,
    over: Callable[[Terms], Coordinates] = dense,
    survey: Callable[..., Any] | None = None,
    scope: str | None = None,
    **fields: Any,
) -> Callable[[Function], Function]:
    """Registers a rule that merges entries, in the coordinates ``over``: ``survey(blocks, *, ...)`` if there
    is one, sees all entries first, then the decorated ``fuse(block, surveyed, *, ...)`` merges them. ``fuse``
    names the parameters; the survey gets the same.

    In the coordinates of the weight the result has no low rank (class D); in others the result has low rank
    and is an adapter already (class C).
    """
    classified: dict[str, Any] = (
        {"needs": "D", "exact": False, "cut": True} if over is dense else {"needs": "C"}
    )

    def register(fuse: Function) -> Function:
        def merge(view: Coordinates, surveyed: Any, scope: str, **params: Any) -> MergedEntries:
            return MergedEntries(view, lambda block: fuse(block, surveyed, **params))

        def function(terms: Terms, surveyed: Any, **params: Any) -> Combination:
            view = over(terms)
            merged = merge(view, surveyed, **params)
            return (
                merged
                if view.back is None
                else view.back(np.concatenate([values for _, values in merged.blocks()], axis=0))
            )

        def look(blocks: EntryBlocks, scope: str, **params: Any) -> Any:
            return None if survey is None else survey(blocks, **params)

        def survey_sites(sites: Sequence[Terms], **params: Any) -> Any:
            changed = [terms for terms in sites if any(len(term.A) for term in terms)]
            blocks = EntryBlocks(lambda: (over(terms) for terms in changed), next(iter(changed), ()))
            return look(blocks, **params)

        def merge_view(view: Coordinates, **params: Any) -> MergedEntries:
            return merge(view, look(EntryBlocks(lambda: iter((view,)), view.terms), **params), **params)

        signature = with_scope(fuse, scope or ("tensor" if survey is None else "adapter"))
        function.__signature__ = signature  # type: ignore[attr-defined]
        merges = merge_view if over is dense else None
        RULES.register(
            Rule(name, summary, function=function, survey=survey_sites, merge=merges, **classified, **fields)
        )
        return fuse

    return register
