"""The sites of an audit in a table, and the figures of a site in words: for the page and for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..io.readable import MISSING, number, percent
from .heat import Matrix

Result = Mapping[str, Any]


def worst(result: Result, most: int) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the sites to look at first, and below them all sites together: for the page
    and for a terminal.
    """
    pairs, based = len(result["packs"]) > 1, result["base"] is not None
    columns = [
        "site",
        "of base" if based else "norm",
        *(["cosine", "overlap", "conflict", "interference", "least kept"] if pairs else ["effective rank"]),
        *(f"fold {dtype}" for dtype in result["dtypes"]),
    ]
    sites = sorted(result["sites"], key=lambda site: (-concern(site), site["path"]))[:most]
    rows = [
        _row(
            site["path"],
            site,
            [one["effective_rank"] for one in site["spectra"] if one["rank"]],
            pairs,
            based,
            result["dtypes"],
        )
        for site in sites
    ]
    if result["total"] is not None:
        ranks = [
            rank
            for index in range(len(result["packs"]))
            if (rank := effective_rank(result, index)) is not None
        ]
        rows.append(_row("all sites", result["total"], ranks, pairs, based, result["dtypes"]))
    return columns, rows


def concern(site: Result) -> float:
    """What the sites are sorted by: interference, or for a lone pack the size of the change."""
    if len(site["norms"]) > 1:
        return number(site["interference"]["relative"]) or 0.0
    return number(site["relative_norms"][0]) or number(site["norms"][0]) or 0.0


def extreme(matrix: Matrix, least: float = 0.0) -> float | None:
    """Of the values off the diagonal the one that lies farthest from ``least``."""
    values = [
        value for i, row in enumerate(matrix) for j, value in enumerate(row) if i < j and value is not None
    ]
    return max(values, key=lambda value: abs(value - least), default=None)


def effective_rank(result: Result, index: int) -> float | None:
    """One pack's effective rank over its sites, each weighted by its energy."""
    spectra = [site["spectra"][index] for site in result["sites"]]
    energy = math.fsum(one["energy"] for one in spectra)
    return math.fsum(one["energy"] * one["effective_rank"] for one in spectra) / energy if energy else None


def decimal(value: object, digits: int = 2) -> str:
    """A number with a few decimals, or that it is missing."""
    figure = number(value)
    return MISSING if figure is None else f"{figure:z.{digits}f}"


def _row(
    name: str, figures: Result, ranks: Sequence[float], pairs: bool, based: bool, dtypes: Sequence[str]
) -> list[str]:
    row = [name, share(figures["combined"]["relative_norm"]) if based else short(figures["combined"]["norm"])]
    if not pairs:
        row.append(decimal(ranks[0] if ranks else None, 1))
    else:
        overlap = [
            value
            for side in ("outputs", "inputs")
            if (value := extreme(figures["overlap"][side])) is not None
        ]
        kept = [value for value in figures["retained"] if value is not None]
        row += [
            decimal(extreme(figures["cosine"])),
            decimal(max(overlap, default=None)),
            percent(extreme(figures["conflict"]["pairs"], 0.5)),
            decimal(figures["interference"]["relative"]),
            decimal(min(kept, default=None)),
        ]
    return row + [percent(figures["fold"].get(dtype, {}).get("relative_error")) for dtype in dtypes]


def short(value: object) -> str:
    """A number in three digits, or that it is missing."""
    figure = number(value)
    return MISSING if figure is None else f"{figure:.3g}"


def share(value: object) -> str:
    """A share that may be far below one percent."""
    figure = number(value)
    return MISSING if figure is None else f"{100 * figure:.2g} %" if figure < 0.1 else percent(figure)
