"""Writes the verdict of an audit: how the packs relate to each other, which rule fits them, and why.

The thresholds are judgements; all of them are here. Unrelated changes of rank ``r`` in ``n`` dimensions
overlap by about ``r / n`` and differ in sign at a half of their common energy, so overlap and conflict are
compared with these values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..composing.rules.rule import RULES
from .audit_report import Audit, AuditVerdict
from .measures import Measures

OPPOSITE = -0.25
ALIGNED = 0.5
APART = 0.1
"""Thresholds of cosines: packs at or below the first undo each other, at or above the second are redundant,
and within the third (either sign) hardly interact.
"""
CONFLICT = 0.56
"""The share of the common energy of two packs at which their signs conflict; unrelated packs have a half."""
SHARED = 0.25
"""The mean squared cosine of principal angles, of both inputs and outputs, from which two packs share
subspaces.
"""
UNEVEN = 3.0
"""A change that is this many times larger than another dominates it."""
LOSSY = 0.25
"""The relative error of a fold above which a quarter of the change is rounding noise, as in
:mod:`adapterpack.merging.checkpoint.report`.
"""
COMPRESSIBLE = 0.02


class _Kind(NamedTuple):
    """A relation between packs: its condition, its wording, the rules that it recommends, and the size of the
    weights.
    """

    name: str
    holds: Callable[[_Facts], bool]
    summary: str
    why: Callable[[_Facts], str]
    rules: tuple[str, ...]
    weights: Callable[[int], float] | None = None


class _Facts(NamedTuple):
    """The figures of the pairs that a verdict uses, with the signs of the weights: the extreme value of each,
    with the names of that pair.
    """

    lowest: tuple[float, str]
    highest: tuple[float, str]
    farthest: float
    conflict: tuple[float, str]
    overlap: tuple[float, str]


_KINDS = (
    _Kind(
        "opposite",
        lambda f: f.lowest[0] <= OPPOSITE,
        "Packs undo each other: serve them apart, or give one a negative weight.",
        lambda f: (
            f"The changes of {f.lowest[1]} point in opposite directions (cosine {f.lowest[0]:.2f}), so a sum "
            "loses what both have learned. If one is to take the other's skill away, give it a negative "
            "weight; if both skills are wanted, keep both: a bank bundle serves them side by side, and "
            "compose --tree routes between them."
        ),
        (),
    ),
    _Kind(
        "aligned",
        lambda f: f.highest[0] >= ALIGNED,
        "Packs say much the same: average them.",
        lambda f: (
            f"The changes of {f.highest[1]} agree (cosine {f.highest[0]:.2f}): a sum with weights 1 would "
            "overshoot, an average (weights of sum 1) keeps what they share."
        ),
        ("linear", "average"),
        lambda count: 1 / count,
    ),
    _Kind(
        "conflict",
        lambda f: f.conflict[0] >= CONFLICT and f.lowest[0] < -APART / 2,
        "Signs conflict: elect a sign before adding up.",
        lambda f: (
            f"Of what {f.conflict[1]} change in common, {f.conflict[0]:.0%} of the energy has opposite "
            "signs (unrelated packs: "
            "50 %), so a plain sum cancels it. Rules that elect one sign an entry keep the stronger side."
        ),
        ("ties", "dare_ties", "della", "sce"),
    ),
    _Kind(
        "shared",
        lambda f: f.overlap[0] >= SHARED,
        "Packs write into the same directions: merge them in the space that they share.",
        lambda f: (
            f"The subspaces of {f.overlap[1]} overlap ({f.overlap[0]:.2f}, where 1 is one subspace) although "
            "the changes themselves differ: a sum lets them overwrite each other. Rules of the joint space "
            "separate or even out the directions."
        ),
        ("knots_ties", "tsv_m", "iso_c", "iso_cts", "core_ties"),
    ),
    _Kind(
        "apart",
        lambda f: f.farthest <= APART,
        "The packs hardly meet: add them up.",
        lambda f: (
            f"No two changes have a cosine beyond {f.farthest:.2f}: a plain sum with weights 1 keeps each of "
            "them whole, while an average keeps only its share of each."
        ),
        ("cat", "linear"),
        lambda count: 1.0,
    ),
    _Kind(
        "mixed",
        lambda f: True,
        "The packs meet in part: a weighted sum, with the weights tried on held-out data.",
        lambda f: (
            f"Cosines reach {f.highest[0]:.2f} ({f.highest[1]}): nothing dominates, so a weighted sum "
            "is the first thing to try."
        ),
        ("linear", "cat"),
    ),
)
"""The kinds in the order in which they are tried; the last always holds."""


def of(audit: Audit) -> AuditVerdict:
    """Returns the verdict on the figures of an audit."""
    total = audit.total
    if total is None:
        return AuditVerdict(
            "nothing",
            "No change of a weight could be measured; only modules trained whole.",
            (),
            tuple(_limits(audit)),
        )
    names = [pack.name for pack in audit.packs]
    if len(names) == 1:
        return AuditVerdict(
            "single",
            _lone(total, names[0]),
            (),
            (*_compressible(audit, total), *_folds(total), *_limits(audit)),
        )
    facts = _facts(total, names)
    kind = next(kind for kind in _KINDS if kind.holds(facts))
    chosen = tuple(name for name in kind.rules if name in RULES and name not in audit.refused)
    reasons = [kind.why(facts)]
    if audit.obstacles:
        chosen = ()
    elif kind.rules and not chosen and audit.refused:
        reasons.append(
            f"Compose refuses these packs by the rules made for this: {next(iter(audit.refused.values()))}"
        )
    elif kind.rules and not chosen:
        reasons.append(
            "None of the rules made for this is installed (see adapterpack rules); keep the packs apart in "
            "a bank bundle or under compose --tree, or compare linear with each pack alone on held-out data."
        )
    hints = [
        *_uneven(total, names),
        *_retained(total, names),
        *_cross(total),
        *_compressible(audit, total),
        *_folds(total),
    ]
    summary = kind.summary
    if audit.obstacles:
        summary = "Compose refuses these packs as they are: serve them side by side. " + summary
    weights = None
    if kind.weights is not None and chosen:
        size = kind.weights(len(names))
        weights = tuple(math.copysign(size, weight) for weight in audit.weights)
    return AuditVerdict(kind.name, summary, chosen, (*reasons, *hints, *_limits(audit)), weights)


def _facts(total: Measures, names: Sequence[str]) -> _Facts:
    signs = np.sign(np.where(total.weights == 0, 1, total.weights))
    cosine = total.cosine * np.outer(signs, signs)
    overlap = np.sqrt(total.overlap[0] * total.overlap[1])
    pairs = [
        (i, j) for i in range(len(names)) for j in range(i + 1, len(names)) if math.isfinite(cosine[i, j])
    ]
    if not pairs:
        return _Facts((0.0, ""), (0.0, ""), 0.0, (0.0, ""), (0.0, ""))

    def extreme(values: np.ndarray, sign: int = 1) -> tuple[float, str]:
        i, j = max(pairs, key=lambda pair: sign * np.nan_to_num(values[pair], nan=-math.inf * sign))
        return float(values[i, j]), f"{names[i]} and {names[j]}"

    return _Facts(
        extreme(cosine, -1),
        extreme(cosine),
        max(abs(cosine[pair]) for pair in pairs),
        extreme(np.nan_to_num(total.entries.pairs)),
        extreme(np.nan_to_num(overlap)),
    )


def _lone(total: Measures, name: str) -> str:
    relative = float(total.relative[0])
    size = f", {relative:.2%} of the norm of the weights that it changes" if math.isfinite(relative) else ""
    return f"One pack: the change of {name} has the norm {total.norms[0]:.4g}{size}."


def _uneven(total: Measures, names: Sequence[str]) -> Iterator[str]:
    sizes = total.norms * np.abs(total.weights)
    present = [index for index, size in enumerate(sizes) if size > 0]
    if len(present) > 1:
        small = min(present, key=lambda i: sizes[i])
        large = max(present, key=lambda i: sizes[i])
        if sizes[large] >= UNEVEN * sizes[small]:
            yield (
                f"Under these weights the change of {names[large]} is {sizes[large] / sizes[small]:.1f} "
                "times as large as that of "
                f"{names[small]}, which it may drown: bring the weights nearer to equal norms."
            )


def _retained(total: Measures, names: Sequence[str]) -> Iterator[str]:
    parts = [
        f"{kept:.2f} of {name}"
        for kept, name in zip(total.retained, names, strict=True)
        if math.isfinite(kept)
    ]
    weights = ", ".join(f"{weight:.3g}" for weight in total.weights)
    yield f"A plain sum with the weights {weights} holds {', '.join(parts)} (1 is all of it)."


def _cross(total: Measures) -> Iterator[str]:
    if total.relative_cross > COMPRESSIBLE:
        yield (
            "Averaging factor by factor, as some tools do by default, would add cross terms of "
            f"{total.relative_cross:.0%} of the sum's norm; no rule here does that."
        )


def _compressible(audit: Audit, total: Measures) -> Iterator[str]:
    most = (
        max((len(S) for site in audit.sites for S in site.spectra), default=0)
        if len(audit.packs) == 1
        else math.inf
    )
    for rank, lost in zip(audit.ranks, total.truncation, strict=True):
        if lost <= COMPRESSIBLE and rank < most:
            what = "The pack" if len(audit.packs) == 1 else "Their weighted sum"
            yield f"{what} fits into rank {rank} at every site with a relative error of {lost:.2%}."
            return


def _folds(total: Measures) -> Iterator[str]:
    for dtype, sums in total.folds.items():
        loss = sums.loss("", dtype)
        if loss.relative_error > LOSSY or not math.isfinite(loss.relative_error):
            yield (
                f"Folded into the base in {dtype}, rounding stores the change with "
                f"{loss.relative_error:.0%} error and keeps "
                f"{loss.kept:.0%} of it: fold into a wider dtype, or keep the adapter unmerged."
            )


def _limits(audit: Audit) -> Iterator[str]:
    yield from audit.obstacles
    if audit.skipped:
        first = audit.skipped[0]
        yield (
            f"{len(audit.skipped)} changes could not be measured and are not in these figures, such as "
            f"{first.path}: {first.reason}"
        )
    if refused := [module.path for module in audit.whole if module.refusal]:
        yield f"Modules trained whole that do not go together: {', '.join(refused[:5])}."
