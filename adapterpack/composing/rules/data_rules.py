"""Rules that need statistics of each adapter on data: RegMean on the factors, and Fisher averaging."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import FormatError
from ...lowrank import Factors, Term, Terms, stack, zero
from .entries import EntryBlock, EntryBlocks, entry_rule, weigh
from .rule import MEAN, Fraction, Positive, Share, rule


@rule(
    "regmean",
    "the change whose outputs are nearest to each adapter's own on that adapter's data; needs moments "
    "of the inputs",
    formula="sum w_i D_i G_i (sum |w_j| G_j)^-1, G_i = X_i^T X_i",
    paper="https://arxiv.org/abs/2212.09849",
    needs="S",
    laws=MEAN,
    statistics="moment",
)
def regmean(terms: Terms, *, alpha: Fraction = 0.9, ridge: Positive = 1e-6) -> Factors:
    """``sum_i w_i D_i G_i (sum_j |w_j| G_j)^-1``: the change whose outputs are nearest to each adapter's own
    on that adapter's inputs.

    ``G_i`` are the moments of the inputs with their off-diagonal entries times ``alpha``, and ``ridge`` of
    their mean diagonal added. ``D_i M = B_i (A_i M)``, so the result has the rank of all adapters together
    and nothing of the size of the weight is formed. Source: RegMean, arXiv 2212.09849, section 3.

    Raises:
        FormatError: the statistics do not have the shape of the site.
    """
    present = [term for term in terms if len(term.A)]
    n = terms[0].change.shape[1]
    total = np.zeros((n, n))
    sides = []
    for term in present:
        G = _regular(_matrix(term, (n, n)), alpha, ridge)
        sides.append(term.A.astype(np.float64) @ G)
        total += abs(term.weight) * G
    if not np.any(total):
        return zero(*terms[0].change.shape)
    solved = np.linalg.solve(total, np.concatenate(sides).T).T
    parts = np.split(solved, np.cumsum([len(side) for side in sides])[:-1])
    return stack(
        [term._replace(A=part.astype(term.A.dtype)) for term, part in zip(present, parts, strict=True)]
    )


def _regular(moment: np.ndarray, alpha: float, ridge: float) -> np.ndarray:
    """Returns the moments in float64, symmetric, with off-diagonal entries damped by ``alpha`` and the ridge
    added, so that the matrix is invertible.
    """
    G: np.ndarray = (moment.astype(np.float64) + moment.T) / 2
    diagonal = np.diag(G).copy()
    G *= alpha
    np.fill_diagonal(G, diagonal + ridge * diagonal.mean())
    return G


def fisher_survey(blocks: EntryBlocks, **_: Any) -> np.ndarray:
    """Returns ``[T]``: the mean squared gradient of each adapter."""
    sums = np.zeros(1)
    count = 0
    for block in blocks():
        F = _gradients(block)
        sums = sums + F.sum(axis=(1, 2), dtype=np.float64)
        count += F[0].size
    return np.asarray(sums / max(1, count))


@entry_rule(
    "fisher",
    "at every entry the mean, by how much each adapter's loss depends on that entry; needs squared gradients",
    formula="sum w_i F_i D_i / sum |w_i| F_i, F_i = mean (dL/dW)^2",
    paper="https://arxiv.org/abs/2111.09832",
    survey=fisher_survey,
    scope="tensor",
    laws=MEAN,
    statistics="fisher",
)
def fisher(
    block: EntryBlock, means: np.ndarray, *, floor: Share = 1e-3, normalize: bool = False
) -> np.ndarray:
    """``sum w_t F_t x_t / sum |w_t| F_t``: at every entry the mean, by how much each adapter's loss depends
    on that entry.

    ``floor`` times the mean of all is added to every ``F``, so that entries on which no loss depends are
    plainly averaged; ``normalize`` brings every adapter's ``F`` to the mean 1 first. Source: Matena and
    Raffel, arXiv 2111.09832, section 3.
    """
    F = _gradients(block).astype(np.float64)
    if normalize:
        F = F / np.where(means > 0, means, 1)[:, None, None]
        means = np.where(means > 0, 1.0, 0.0)
    F = F + (floor * means.mean() or 1.0)
    total = weigh(np.abs(block.weights), F).sum(axis=0)
    return np.asarray((weigh(block.weights, F) * block.values).sum(axis=0) / total).astype(block.values.dtype)


def _gradients(block: EntryBlock) -> np.ndarray:
    """Returns the squared gradients ``[T, b, n]``, with zeros for an adapter that does not change the
    site.
    """
    shape = block.values.shape[1:]
    return np.stack(
        [np.zeros(shape, np.float32) if gradient is None else gradient for gradient in block.measured]
    )


def _matrix(term: Term, shape: tuple[int, int]) -> np.ndarray:
    if term.measured is None or term.measured.shape != shape:
        found = "nothing" if term.measured is None else list(term.measured.shape)
        raise FormatError(
            "what was measured does not fit this site",
            where=term.key,
            expected=list(shape),
            found=found,
            remedy="measure the pack again on its own base",
        )
    if not np.isfinite(term.measured).all():
        raise FormatError("what was measured is not finite", where=term.key, remedy="measure the pack again")
    return term.measured
