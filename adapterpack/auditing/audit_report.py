"""The result of an audit, and the object that ``--json`` prints: matrices as lists of rows, null for
undefined values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..io import Json
from ..lowrank import Cut, energy_of
from ..notebook import Shown
from ..pack import Pack
from .measures import Measures, effective_rank, pool, stable_rank

_LAYER = re.compile(r"(?:^|\.)(\d{1,6})\.")
_DIGITS = 6
LIMITS = (
    "A screen is no proof in either direction: it compares the sizes and spectra of changes with those of "
    "clean packs, and sees neither what an adapter answers nor a backdoor whose spectra look like theirs, "
    "as most that were measured do."
)


class AuditVerdict(NamedTuple):
    """The verdict: ``kind`` for scripts, a one-sentence summary, the registered rules that fit (best first),
    the reasons, hints in reading order, and the recommended weights, or None where they need data.
    """

    kind: str
    summary: str
    rules: tuple[str, ...]
    reasons: tuple[str, ...]
    weights: tuple[float, ...] | None = None


NOT_YET = AuditVerdict("nothing", "", (), ())


class Skipped(NamedTuple):
    """A pack's change at a site that could not be measured, and why."""

    pack: str
    path: str
    reason: str


class AuditedModule(NamedTuple):
    """A fully trained module in the packs: how many numbers it has, and why compose would refuse it, or None
    if compose averages it.
    """

    path: str
    packs: tuple[str, ...]
    numbers: int
    refusal: str | None

    @property
    def treatment(self) -> str:
        """What compose does with the module, in words."""
        return (
            "averaged under the weights brought to sum 1"
            if self.refusal is None
            else f"refused: {self.refusal}"
        )


@dataclass(frozen=True)
class AuditedSite:
    """The figures of one site: ``rows`` of its ``shape[0]`` rows were scanned entry by entry; ``spectra`` are
    the singular values of each pack's change; ``approximation`` is the relative error of writing changes
    without a low rank as factors.
    """

    path: str
    shape: tuple[int, int]
    rows: int
    measures: Measures
    spectra: tuple[np.ndarray, ...]
    approximation: float

    @property
    def layer(self) -> int | None:
        """The layer number in the path, or None."""
        return place_of(self.path)[1]

    @property
    def module(self) -> str:
        """The part of the path below the layer."""
        return place_of(self.path)[0]

    @property
    def concern(self) -> float:
        """How much attention the site needs: its interference relative to the norm, or for a lone pack its
        energy.
        """
        if len(self.spectra) > 1:
            return self.measures.relative_interference
        relative = float(self.measures.relative[0])
        return relative if math.isfinite(relative) else float(self.measures.norms[0])


class Screened(NamedTuple):
    """What a screen says of one pack: ``unusual``, ``not unusual`` or ``not screened``.

    ``p`` is the share of the clean packs and this one that look at least as unusual; None if not screened.
    ``reasons`` are the figures that stand out most, or why the pack was not screened.
    """

    pack: str
    outcome: str
    p: float | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Screen:
    """The outcome of a screen, with its scope: the number and kind of the clean packs."""

    clean: int
    rate: float
    scope: str
    packs: tuple[Screened, ...]

    def to_json(self) -> Json:
        """Returns the screen as the command prints it."""
        return {
            "limits": LIMITS,
            "clean": self.clean,
            "rate": self.rate,
            "scope": self.scope,
            "packs": [{**pack._asdict(), "reasons": list(pack.reasons)} for pack in self.packs],
        }


@dataclass(frozen=True)
class Audit(Shown):
    """All figures of an audit. ``ranks`` and ``dtypes`` are those with reported losses; ``obstacles`` are the
    reasons why compose would refuse the packs under any rule, and ``refused`` maps single rules to the
    reasons why compose would refuse the packs under them. ``screen`` is None where none was asked for.
    """

    packs: tuple[Pack, ...]
    weights: tuple[float, ...]
    base: str | None
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]
    sites: tuple[AuditedSite, ...]
    skipped: tuple[Skipped, ...]
    whole: tuple[AuditedModule, ...]
    obstacles: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    verdict: AuditVerdict = NOT_YET
    screen: Screen | None = None

    def __repr__(self) -> str:
        return f"<Audit of {', '.join(pack.name for pack in self.packs)}: {self.verdict.summary}>"

    @cached_property
    def total(self) -> Measures | None:
        """The measures of all sites together; None where there are none."""
        return pool([site.measures for site in self.sites]) if self.sites else None

    def worst(self, count: int = 10) -> list[AuditedSite]:
        """Returns the ``count`` sites of greatest concern, worst first."""
        return sorted(self.sites, key=lambda site: (-site.concern, site.path))[:count]

    def to_json(self) -> Json:
        """Returns the audit as the command prints it."""
        return {
            "packs": [
                {
                    "name": pack.name,
                    "id": pack.id,
                    "method": ", ".join(method.name for method in pack.methods),
                    "weight": weight,
                    "sites": sum(bool(len(site.spectra[index])) for site in self.sites),
                }
                for index, (pack, weight) in enumerate(zip(self.packs, self.weights, strict=True))
            ],
            "base": self.base,
            "ranks": list(self.ranks),
            "dtypes": list(self.dtypes),
            "verdict": {
                "kind": self.verdict.kind,
                "summary": self.verdict.summary,
                "rules": list(self.verdict.rules),
                "weights": None if self.verdict.weights is None else list(self.verdict.weights),
                "reasons": list(self.verdict.reasons),
            },
            "total": None if self.total is None else self._figures(self.total),
            "sites": [self._site(site) for site in self.sites],
            "skipped": [skipped._asdict() for skipped in self.skipped],
            "whole": [
                {
                    "path": module.path,
                    "packs": list(module.packs),
                    "numbers": module.numbers,
                    "averaged": module.refusal is None,
                    "treatment": module.treatment,
                }
                for module in self.whole
            ],
            "obstacles": list(self.obstacles),
            "screen": None if self.screen is None else self.screen.to_json(),
        }

    def _site(self, site: AuditedSite) -> Json:
        return {
            "path": site.path,
            "layer": site.layer,
            "module": site.module,
            "shape": list(site.shape),
            "rows_examined": site.rows,
            "sampled": site.rows < site.shape[0],
            "approximation": _number(site.approximation),
            "spectra": [
                {
                    "rank": len(S),
                    "effective_rank": _number(effective_rank(S)),
                    "stable_rank": _number(stable_rank(S)),
                    "rank_99": Cut(energy=0.99).kept(S),
                    "energy": _number(energy_of(S)),
                    "values": _list(S),
                }
                for S in site.spectra
            ],
            **self._figures(site.measures),
        }

    def _figures(self, measures: Measures) -> Json:
        overlap, entries = measures.overlap, measures.entries
        base = measures.base and math.sqrt(measures.base)
        return {
            "norms": _list(measures.norms),
            "base_norm": None if base is None else _number(base),
            "relative_norms": _list(measures.relative),
            "combined": {
                "norm": _number(measures.combined),
                "relative_norm": _number(measures.combined / base) if base else None,
            },
            "cosine": _list(measures.cosine),
            "overlap": {"outputs": _list(overlap[0]), "inputs": _list(overlap[1])},
            "interference": {
                "total": _number(measures.interference),
                "relative": _number(measures.relative_interference),
            },
            "conflict": {
                "share": _number(entries.conflict),
                "large": _number(entries.large_conflict),
                "cancelled": _number(entries.cancelled),
                "pairs": _list(entries.pairs),
            },
            "retained": _list(measures.retained),
            "cross_terms": _number(measures.relative_cross),
            "truncation": {
                str(rank): _number(loss) for rank, loss in zip(self.ranks, measures.truncation, strict=True)
            },
            "fold": {
                dtype: {"relative_error": _number(loss.relative_error), "kept": _number(loss.kept)}
                for dtype, sums in measures.folds.items()
                for loss in [sums.loss("", dtype)]
            },
        }


def place_of(path: str) -> tuple[str, int | None]:
    """Splits the path of a site into the part below the layer and the layer's number.

    Example:
        >>> place_of("model.layers.3.mlp.up_proj"), place_of("lm_head")
        (('mlp.up_proj', 3), ('lm_head', None))
    """
    match = _LAYER.search(path)
    return (path[match.end() :], int(match[1])) if match else (path, None)


def _list(values: Sequence[Any] | np.ndarray) -> list[Any]:
    return [_list(value) if np.ndim(value) else _number(float(value)) for value in values]


def _number(value: float) -> float | None:
    """Rounds to six digits, more than any figure's precision; returns None for NaN."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
