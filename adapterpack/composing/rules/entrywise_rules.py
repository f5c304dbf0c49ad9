"""Entrywise rules such as TIES, DARE and DELLA: they merge the entries ``[T, b, n]`` of all changes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from ...errors import ConfigError
from ...lowrank import magnitudes
from ...lowrank.quantiles import level
from .entries import EntryBlock, EntryBlocks, core_space, entry_rule, knots, weigh
from .rule import MEAN, SUM, THINNED, Count, Fraction, Laws, Seed, Share
from .trim import Levels, band, band_levels, drop, dropped_by_rank, largest_level, trim

_TIE = 1e-6
"""The share of the votes below which a majority counts as a tie, since it is only rounding in float32."""
_THIN: dict[str, Any] = {"each": ("density",), "neutral": THINNED}
"""What rules that leave out entries have in common."""
_TILE = 1 << 14
"""The entries of each change in one vote, so that they fit into a core's cache."""


def elect(
    values: np.ndarray, weights: np.ndarray, normalize: bool, least: np.ndarray | None = None
) -> np.ndarray:
    """TIES: elects at each entry the sign of ``sum w_t x_t``, and adds up the ``w_t x_t`` that have that
    sign.

    ``values`` are ``[T, ...]``; with ``least`` ``[T]``, :func:`~.trim.trim` trims them first. A tie elects no
    sign and gives 0. ``normalize`` divides by the sum of the ``|w_t|`` that were added: a mean that is never
    larger than its largest part.

    Example:
        >>> values = np.array([[3.0, 1.0, -1.0], [1.0, -1.0, -0.5]], np.float32)
        >>> elect(values, np.ones(2), True), elect(values, np.ones(2), True, np.array([0.0, 2.0],
        ...     np.float32))
        (array([ 2.  ,  0.  , -0.75], dtype=float32), array([ 3.,  1., -1.], dtype=float32))
    """
    flat = values.reshape(len(values), -1)
    weights = weights.astype(values.dtype)
    merged = np.empty(flat.shape[1], values.dtype)
    for start in range(0, len(merged), _TILE):
        tile = flat[:, start : start + _TILE]
        votes = weights[:, None] * tile
        if least is not None:
            votes *= magnitudes(tile) >= least[:, None]
        merged[start : start + _TILE] = _elect(votes, weights, normalize)
    return np.reshape(merged, values.shape[1:])


def _elect(votes: np.ndarray, weights: np.ndarray, normalize: bool) -> np.ndarray:
    """Does the work of :func:`elect` for ``[T, n]`` entries that are already times their weights."""
    lead = votes.sum(axis=0)
    positive = np.maximum(votes, 0).sum(axis=0)
    # Both sums run in the same order, so that the difference is exactly 0 where no entry is negative.
    won = lead > 0
    negative = lead - positive
    merged = np.where(won, positive, negative)
    if normalize:
        agree = (votes > 0) == won
        total = np.zeros_like(lead)
        agree &= votes != 0
        for size in np.unique(np.abs(weights)):
            total += size * agree[np.abs(weights) == size].sum(axis=0, dtype=np.uint8)
        merged /= np.maximum(total, np.finfo(total.dtype).tiny)  # no votes: 0 divided by tiny
    decided = np.abs(lead) > lead.dtype.type(_TIE) * (positive - negative)
    result: np.ndarray = np.where(decided, merged, lead.dtype.type(0))
    return result


def _scale(lam: float, merged: np.ndarray) -> np.ndarray:
    """Returns ``lam`` times the change, without a pass over the data if ``lam`` is 1."""
    return merged if lam == 1 else np.asarray(lam * merged)


@entry_rule(
    "magnitude_prune",
    "the weighted sum of the largest entries of each change",
    formula="sum w_i trim(D_i)",
    paper="https://arxiv.org/abs/2306.01708",
    survey=largest_level,
    **_THIN,
    laws=SUM,
)
def magnitude_prune(block: EntryBlock, least: np.ndarray, *, density: Share = 0.5) -> np.ndarray:
    """``sum w_t trim(x_t)``."""
    return block.total(trim(block.values, least))


@entry_rule(
    "ties",
    "the largest entries of each change; at each place a vote on the sign, and the mean of those who agree",
    formula="lam sum_{agree} w_i trim(D_i) / sum_{agree} |w_i|",
    paper="https://arxiv.org/abs/2306.01708",
    survey=largest_level,
    **_THIN,
    laws=MEAN,
)
@entry_rule(
    "knots_ties",
    "TIES on the columns' coordinates in the changes' joint singular vectors: an adapter as it stands",
    formula="U ties([X_1 .. X_T]), [D_1 .. D_T] = U [X_1 .. X_T]",
    paper="https://arxiv.org/abs/2410.19735",
    over=knots,
    survey=largest_level,
    **_THIN,
    laws=MEAN,
)
@entry_rule(
    "core_ties",
    "TIES in the bases of all columns and all rows: an adapter as it stands",
    formula="U ties(U^T D_t V) V^T",
    paper="https://arxiv.org/abs/2509.17786",
    over=core_space,
    survey=largest_level,
    **_THIN,
    laws=MEAN,
)
def ties(
    block: EntryBlock, least: np.ndarray, *, density: Share = 0.2, lam: float = 1.0, normalize: bool = True
) -> np.ndarray:
    """Returns ``lam`` times the disjoint mean of the trimmed changes: the mean of the entries that have the
    elected sign.
    """
    return _scale(lam, elect(block.values, block.weights, normalize, least))


@entry_rule(
    "dare_linear",
    "entries dropped at random and the rest scaled up, then the weighted sum",
    formula="sum w_i m_i D_i / density",
    paper="https://arxiv.org/abs/2311.03099",
    **_THIN,
    laws=SUM,
)
def dare_linear(block: EntryBlock, _: None, *, density: Share = 0.5, seed: Seed = 0) -> np.ndarray:
    """``sum w_t m_t x_t / density``."""
    return block.total(drop(block, density, seed))


@entry_rule(
    "dare_ties",
    "entries dropped at random and the rest scaled up, then TIES' vote and mean",
    formula="lam sum_{agree} w_i m_i D_i / (density sum_{agree} |w_i|)",
    paper="https://arxiv.org/abs/2311.03099",
    **_THIN,
    laws=MEAN,
)
@entry_rule(
    "knots_dare_ties",
    "DARE with TIES' vote in KnOTS' coordinates: an adapter as it stands",
    formula="U dare_ties([X_1 .. X_T]), [D_1 .. D_T] = U [X_1 .. X_T]",
    paper="https://arxiv.org/abs/2410.19735",
    over=knots,
    **_THIN,
    laws=MEAN,
)
@entry_rule(
    "core_dare_ties",
    "DARE with TIES' vote in the bases of all columns and all rows: an adapter as it stands",
    formula="U dare_ties(U^T D_t V) V^T",
    paper="https://arxiv.org/abs/2509.17786",
    over=core_space,
    **_THIN,
    laws=MEAN,
)
def dare_ties(
    block: EntryBlock,
    _: None,
    *,
    density: Share = 0.5,
    lam: float = 1.0,
    normalize: bool = True,
    seed: Seed = 0,
) -> np.ndarray:
    """Applies TIES' election to changes whose entries were dropped at random."""
    return _scale(lam, elect(drop(block, density, seed), block.weights, normalize))


@entry_rule(
    "della",
    "DARE with larger entries kept more often, each divided by its own probability; then TIES' vote and mean",
    formula="lam sum_{agree} w_i m_i D_i / p_i / sum_{agree} |w_i|",
    paper="https://arxiv.org/abs/2406.11617",
    each=("density", "epsilon"),
    neutral=THINNED,
    laws=MEAN,
)
def della(
    block: EntryBlock,
    _: None,
    *,
    density: Share = 0.5,
    epsilon: Fraction = 0.15,
    lam: float = 1.0,
    normalize: bool = True,
    seed: Seed = 0,
) -> np.ndarray:
    """Applies TIES' election to changes that keep larger entries with a higher probability and divide each
    entry by its probability.
    """
    return _scale(lam, elect(dropped_by_rank(block, density, epsilon, seed), block.weights, normalize))


@entry_rule(
    "della_linear",
    "DARE with larger entries kept more often, each divided by its own probability; then the weighted sum",
    formula="sum w_i m_i D_i / p_i",
    paper="https://arxiv.org/abs/2406.11617",
    each=("density", "epsilon"),
    neutral=THINNED,
    laws=SUM,
)
def della_linear(
    block: EntryBlock, _: None, *, density: Share = 0.5, epsilon: Fraction = 0.15, seed: Seed = 0
) -> np.ndarray:
    """Sums, by weight, changes that keep larger entries with a higher probability and divide each entry by
    its probability.
    """
    return block.total(dropped_by_rank(block, density, epsilon, seed))


@entry_rule(
    "breadcrumbs",
    "the weighted sum without the largest and without the smallest entries",
    formula="sum w_i band(D_i)",
    paper="https://arxiv.org/abs/2312.06795",
    survey=band_levels,
    each=("density", "gamma"),
    neutral={"density": 1.0, "gamma": 0.0},
    laws=SUM,
)
def breadcrumbs(
    block: EntryBlock, levels: Levels, *, density: Share = 0.9, gamma: Fraction = 0.01
) -> np.ndarray:
    """``sum w_t band(x_t)``."""
    return block.total(band(block, levels))


@entry_rule(
    "breadcrumbs_ties",
    "without the largest and without the smallest entries, TIES' vote and mean",
    formula="lam sum_{agree} w_i band(D_i) / sum_{agree} |w_i|",
    paper="https://arxiv.org/abs/2312.06795",
    survey=band_levels,
    each=("density", "gamma"),
    neutral={"density": 1.0, "gamma": 0.0},
    laws=MEAN,
)
def breadcrumbs_ties(
    block: EntryBlock,
    levels: Levels,
    *,
    density: Share = 0.9,
    gamma: Fraction = 0.01,
    lam: float = 1.0,
    normalize: bool = True,
) -> np.ndarray:
    """Applies TIES' election to the bands."""
    return _scale(lam, elect(band(block, levels), block.weights, normalize))


@entry_rule(
    "magmax",
    "at each place the entry of the largest size",
    formula="alpha w_j D_j, j = argmax |w_i D_i|",
    paper="https://arxiv.org/abs/2407.06322",
    unit=True,
)
def magmax(block: EntryBlock, _: None, *, alpha: float = 1.0) -> np.ndarray:
    """Returns ``alpha`` times the entry ``w_t x_t`` of largest magnitude; 0 where the two largest are
    opposite.
    """
    parts = block.weighted
    high = parts.max(axis=0)
    low = parts.min(axis=0)
    return alpha * np.where(high > -low, high, np.where(high < -low, low, 0))


def _variance(block: EntryBlock) -> np.ndarray:
    return np.asarray(np.var(block.signed, axis=0, keepdims=True).astype(np.float32))


class Selected(NamedTuple):
    """SCE's survey: the lowest variance that is selected ``[1]``, and the mean square of each change at the
    selected positions ``[T]``.
    """

    least: np.ndarray
    energy: np.ndarray


def sce_survey(blocks: EntryBlocks, *, density: float, **_: Any) -> Selected:
    """Finds the positions where the changes differ most, and the energy of each change there."""
    (share, *_) = blocks.each("density", density).tolist()
    least = level(lambda: (_variance(block) for block in blocks()), share)
    energy = sum(
        np.sum(np.where(_variance(block) >= least, block.values, 0).astype(np.float64) ** 2, axis=(1, 2))
        for block in blocks()
    )
    return Selected(least, np.asarray(energy))


@entry_rule(
    "sce",
    "the places where the changes differ most, weights by the energy there, minority signs erased",
    formula="lam sum_{agree} e_i D_i / sum_{agree} |e_i|, e_i = w_i mean(D_i^2)",
    paper="https://arxiv.org/abs/2408.07990",
    survey=sce_survey,
    scope="tensor",
    **_THIN,
    laws=MEAN,
)
def sce(
    block: EntryBlock,
    selected: Selected,
    *,
    density: Share = 0.5,
    lam: float = 1.0,
    vote: Literal["energy", "even"] = "energy",
) -> np.ndarray:
    """Keeps positions of high variance, weights the changes by their energy there, drops minority signs, and
    averages the rest. In an ``even`` vote on the sign every change counts alike.
    """
    shares = np.abs(block.weights) * selected.energy
    if not shares.any():
        return np.zeros(block.values.shape[1:], block.values.dtype)
    signed = np.sign(block.weights) * shares / shares.sum()
    chosen = np.where(_variance(block) >= selected.least, block.values, 0)
    if vote == "even":
        parts = weigh(np.sign(block.weights), chosen)
        chosen = np.where(parts * parts.sum(axis=0) > 0, chosen, 0)
    return _scale(lam, elect(chosen, signed, True))


class Balance(NamedTuple):
    """PCB's survey ``[T]``: the lower and upper magnitude at which entries are clamped, and the scores that
    map to 0 and to 1.
    """

    lower: np.ndarray
    upper: np.ndarray
    least: np.ndarray
    most: np.ndarray


def _scores(block: EntryBlock, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Returns ``exp(T norm(|x|)^2) tanh(x_t sum x)`` where positive: the first factor compares entries within
    a change, the second between the changes.
    """
    x = block.signed.astype(np.float64)
    a, b = (ends[:, None, None].astype(np.float64) for ends in (lower, upper))
    norm = (np.clip(np.abs(x), a, b) - a) / np.where(b > a, b - a, 1)
    return np.asarray((np.exp(len(x) * norm**2) * np.tanh(x * x.sum(axis=0))).clip(0).astype(np.float32))


def pcb_survey(blocks: EntryBlocks, *, density: float, **_: Any) -> Balance:
    """Computes the quantiles of magnitudes and scores that :class:`Balance` lists."""
    sizes = lambda: (magnitudes(block.values) for block in blocks())  # noqa: E731
    lower, upper = level(sizes, 0.9999), level(sizes, 0.0001)
    least = (
        level(lambda: (_scores(block, lower, upper) for block in blocks()), density)
        if density < 1
        else np.zeros_like(lower)
    )
    most = np.max([_scores(block, lower, upper).max(axis=(1, 2)) for block in blocks()], axis=0)
    return Balance(lower, upper, least, most)


@entry_rule(
    "pcb",
    "entries weighed by their size in their change and by their agreement with the others; not free of scale",
    formula="lam sum w_i s_i D_i / sum |w_i| s_i, s_i = exp(T norm(|D_i|)^2) tanh(D_i sum D)",
    paper="https://arxiv.org/abs/2410.02396",
    survey=pcb_survey,
    neutral=THINNED,
    laws=MEAN._replace(homogeneous=False),
)
def pcb(block: EntryBlock, balance: Balance, *, density: Share = 0.1, lam: float = 1.0) -> np.ndarray:
    """``lam sum_t w_t x_t score_t / sum_t |w_t| score_t``, of the entries whose score is among the
    ``density`` largest.
    """
    least, most = (ends[:, None, None] for ends in (balance.least, balance.most))
    scores = (_scores(block, balance.lower, balance.upper) - least).clip(0) / np.where(
        most > least, most - least, 1
    )
    scores = np.where(most > least, scores, most > 0).astype(np.float64)
    total = weigh(np.abs(block.weights), scores).sum(axis=0)
    merged = (weigh(block.weights, scores) * block.values).sum(axis=0)
    return np.asarray(
        (lam * np.divide(merged, total, out=np.zeros_like(merged), where=total > 0)).astype(
            block.values.dtype
        )
    )


def _unify(block: EntryBlock) -> np.ndarray:
    """EMR: combines the elected sign at every entry with the largest magnitude among the entries of that
    sign.
    """
    x = block.signed
    sign = np.sign(block.weighted.sum(axis=0))
    return np.asarray(sign * np.max(np.where(np.sign(x) == sign, np.abs(x), 0), axis=0))


def _mask(block: EntryBlock) -> np.ndarray:
    """``M_t * unified``: where a change has the elected sign."""
    unified = _unify(block)
    return np.where(block.signed * unified > 0, unified, 0)


def _size(values: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(values).sum(axis=(1, 2), dtype=np.float64))


def emr_survey(blocks: EntryBlocks, **_: Any) -> np.ndarray:
    """Returns ``[T]``: ``sum |x_t| / sum |M_t * unified|``, the rescaling of each change."""
    sums = np.sum([[_size(block.values), _size(_mask(block))] for block in blocks()], axis=0)
    return np.asarray(np.divide(sums[0], sums[1], out=np.zeros(len(sums[0])), where=sums[1] > 0))


@entry_rule(
    "emr",
    "the elected sign with the largest entry that has it; or, for one task, with that pack's mask and scale",
    formula="sgn(sum w_i D_i) max_{agree} |D_i|",
    paper="https://arxiv.org/abs/2405.17461",
    survey=emr_survey,
    laws=MEAN,
)
def emr(block: EntryBlock, scales: np.ndarray, *, task: str = "") -> np.ndarray:
    """Returns the unified change; with ``task``, a pack's name, applies that pack's mask and scale, as
    serving does.

    Raises:
        ConfigError: no pack with a nonzero weight has that name.
    """
    if not task:
        return _unify(block)
    names = [key.rpartition(":")[0] for key in block.keys]
    if task not in names:
        raise ConfigError(
            "none of the packs has that name",
            where="task",
            expected=" or ".join(names),
            found=repr(task),
            remedy="give the name of one of the packs",
        )
    index = names.index(task)
    return np.asarray(np.sign(block.weights[index]) * scales[index] * _mask(block)[index])


@entry_rule(
    "consensus",
    "the sum, where enough packs find it important for themselves (TALL masks)",
    formula="alpha [count(|w_i D_i| > threshold |sum - w_i D_i|) >= agreeing] sum w_i D_i",
    paper="https://arxiv.org/abs/2405.07813",
    unit=True,
    neutral={"agreeing": 1, "threshold": 0.0},
    laws=Laws(sums=True),
)
def consensus(
    block: EntryBlock, _: None, *, threshold: float = 0.4, agreeing: Count = 2, alpha: float = 1.0
) -> np.ndarray:
    """``alpha sum w_t x_t`` where at least ``agreeing`` of the masks ``|w_t x_t| > threshold |sum - w_t
    x_t|`` are on.
    """
    parts = block.weighted
    total = parts.sum(axis=0)
    masks = np.abs(parts) > threshold * np.abs(total - parts)
    return np.where(masks.sum(axis=0) >= agreeing, alpha * total, 0)
