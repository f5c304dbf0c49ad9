"""Renders the page of ``adapterpack audit --html``, and the table of sites that the terminal shows too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from statistics import median_low

from ..io import Json
from ..readable import count, figure, number, percent
from .chart import Chart, line_charts
from .page import Card, Table, render

_LISTED = 100
"""The most sites in the page's table."""
Matrix = Sequence[Sequence[float | None]]


def audit_report(result: Json) -> str:
    """Writes what ``Audit.to_json()`` gives as one self-contained HTML page."""
    total = result["total"]
    verdict = result["verdict"]
    names = ", ".join(_names(result))
    options = "".join(f" --weight {weight:.3g}" for weight in verdict["weights"] or ()) + (
        " --base BASE" if result["base"] else ""
    )
    approximated = [site["approximation"] for site in result["sites"] if site["approximation"]]
    return render(
        "audit.html.jinja",
        title=f"Audit of {names}" if len(names) < 80 else f"Audit of {len(result['packs'])} packs",
        packs=result["packs"],
        sites=len(result["sites"]),
        verdict=verdict,
        screen=result["screen"] and (result["screen"]["limits"], screened_packs(result)),
        cards=_cards(result) if total else (),
        commands=[f"adapterpack compose PACK... --rule {rule}{options} -o OUT" for rule in verdict["rules"]],
        changes=_changes(result) if total else (),
        pairs=_pairs(result) if total and len(result["packs"]) > 1 else (),
        spectra=_spectra(result),
        truncation=[[f"rank {rank}", share(loss)] for rank, loss in total["truncation"].items()]
        if total
        else (),
        folds=[
            [dtype, percent(loss["relative_error"]), percent(loss["kept"])]
            for dtype, loss in total["fold"].items()
        ]
        if total
        else (),
        worst=worst_sites(result, _LISTED),
        shown=min(_LISTED, len(result["sites"])),
        whole=[
            [module["path"], ", ".join(module["packs"]), count(module["numbers"]), module["treatment"]]
            for module in result["whole"]
        ],
        skipped=[[site["pack"], site["path"], site["reason"]] for site in result["skipped"][:_LISTED]],
        left_out=len(result["skipped"]),
        sampled=sum(bool(site["sampled"]) for site in result["sites"]),
        approximated=len(approximated),
        error=share(max(approximated, default=None)),
    )


def worst_sites(result: Json, most: int) -> Table:
    """Lists the sites to look at first, and below them all sites together: for the page and for a
    terminal.
    """
    pairs = len(result["packs"]) > 1
    based = result["base"] is not None
    columns = [
        "site",
        "of base" if based else "norm",
        *(["cosine", "overlap", "conflict", "interference", "least kept"] if pairs else ["effective rank"]),
        *(f"fold {dtype}" for dtype in result["dtypes"]),
    ]
    sites = sorted(result["sites"], key=lambda site: (-_concern(site), site["path"]))[:most]

    def row(name: str, figures: Json, ranks: Sequence[float]) -> list[str]:
        combined = figures["combined"]
        return [
            name,
            share(combined["relative_norm"]) if based else figure(combined["norm"]),
            *(_pair_figures(figures) if pairs else [decimal(ranks[0] if ranks else None, 1)]),
            *(percent(figures["fold"].get(dtype, {}).get("relative_error")) for dtype in result["dtypes"]),
        ]

    rows = [
        row(site["path"], site, [one["effective_rank"] for one in site["spectra"] if one["rank"]])
        for site in sites
    ]
    if result["total"] is not None:
        ranks = [_effective_rank(result, index) for index in range(len(result["packs"]))]
        rows.append(row("all sites", result["total"], [rank for rank in ranks if rank is not None]))
    return columns, rows


def screened_packs(result: Json) -> tuple[list[str], list[list[str]], str]:
    """Lists what the screen says of each pack, with a caption that says what it was compared with."""
    screen = result["screen"]
    rows = [
        [pack["pack"], pack["outcome"], decimal(pack["p"], 3), "; ".join(pack["reasons"])]
        for pack in screen["packs"]
    ]
    return (
        ["pack", "screen", "p", "figures that stand out most, or why not"],
        rows,
        f"compared with {screen['clean']} clean {screen['scope']}; of such packs at most "
        f"{percent(screen['rate'])} are called unusual",
    )


def _concern(site: Json) -> float:
    """Returns the sort key of the sites: interference, or for a lone pack the size of the change."""
    if len(site["norms"]) > 1:
        return number(site["interference"]["relative"]) or 0.0
    return number(site["relative_norms"][0]) or number(site["norms"][0]) or 0.0


def _pair_figures(figures: Json) -> list[str]:
    overlap = [
        value for side in ("outputs", "inputs") if (value := _extreme(figures["overlap"][side])) is not None
    ]
    retained = [value for value in figures["retained"] if value is not None]
    return [
        decimal(_extreme(figures["cosine"])),
        decimal(max(overlap, default=None)),
        percent(_extreme(figures["conflict"]["pairs"], 0.5)),
        decimal(figures["interference"]["relative"]),
        decimal(min(retained, default=None)),
    ]


def _extreme(matrix: Matrix, least: float = 0.0) -> float | None:
    """Returns the off-diagonal value farthest from ``least``."""
    values = [
        value for i, row in enumerate(matrix) for j, value in enumerate(row) if i < j and value is not None
    ]
    return max(values, key=lambda value: abs(value - least), default=None)


def _effective_rank(result: Json, index: int) -> float | None:
    """Returns one pack's effective rank: the mean over its sites, weighted by energy."""
    spectra = [site["spectra"][index] for site in result["sites"]]
    energy = math.fsum(one["energy"] for one in spectra)
    return math.fsum(one["energy"] * one["effective_rank"] for one in spectra) / energy if energy else None


def decimal(value: object, digits: int = 2) -> str:
    """Formats a number with ``digits`` decimals, or states that it is missing."""
    return figure(value, f"z.{digits}f")


def share(value: object) -> str:
    """Formats a share that may be far below one percent."""
    known = number(value)
    return percent(value) if known is None or known >= 0.1 else f"{100 * known:.2g} %"


def _names(result: Json) -> list[str]:
    return [str(pack["name"]) for pack in result["packs"]]


def _cards(result: Json) -> list[Card]:
    total = result["total"]
    many = len(result["packs"]) > 1
    relative = number(total["combined"]["relative_norm"])
    cards = [
        Card(
            "sites",
            f"{len(result['sites']):,}",
            f"of {len(result['packs'])} packs" if many else "of one pack",
        ),
        Card(
            "size of the sum" if many else "size of the change",
            figure(total["combined"]["norm"]) if relative is None else share(relative),
            "Frobenius norm" if relative is None else "of the weights' norm",
        ),
    ]
    if many:
        cosine = _extreme(total["cosine"])
        conflict = _extreme(total["conflict"]["pairs"], 0.5)
        cards.append(Card("strongest cosine", decimal(cosine), "1 the same, 0 unrelated, -1 opposite"))
        cards.append(Card("sign conflict", percent(conflict), "50 % is chance"))
    for dtype, loss in list(total["fold"].items())[:1]:
        cards.append(
            Card(f"lost in {dtype}", percent(loss["relative_error"]), "by rounding, if folded into the base")
        )
    return cards


def _changes(result: Json) -> Table:
    """Builds a table with one row for each pack; omits columns that need a sum or a base where there is
    none.
    """
    total = result["total"]
    many = len(result["packs"]) > 1
    based = result["base"] is not None
    columns = {
        "pack": _names(result),
        "method": [pack["method"] for pack in result["packs"]],
        "sites": [f"{pack['sites']:,}" for pack in result["packs"]],
        **({"weight": [f"{pack['weight']:.3g}" for pack in result["packs"]]} if many else {}),
        "norm": list(map(figure, total["norms"])),
        **({"of base": list(map(share, total["relative_norms"]))} if based else {}),
        "effective rank": [decimal(_effective_rank(result, at), 1) for at in range(len(result["packs"]))],
        **({"kept by the sum": list(map(decimal, total["retained"]))} if many else {}),
    }
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _pairs(result: Json) -> list[tuple[str, Table]]:
    """Builds a table for each figure, with its caption: one row and one column for each pack."""
    names = _names(result)
    total = result["total"]
    columns = ["pack", *(str(index + 1) for index in range(len(names)))]
    tables = [
        (total["cosine"], decimal, "Cosine of the changes: 1 the same, 0 unrelated, -1 opposite."),
        (
            total["conflict"]["pairs"],
            percent,
            "Sign conflict: the share of what two packs change in common at which their signs differ. "
            "Chance is 50 %.",
        ),
        (
            total["overlap"]["outputs"],
            decimal,
            "Shared outputs: how far two packs write into the same directions.",
        ),
        (total["overlap"]["inputs"], decimal, "Shared inputs: how far two packs read the same directions."),
    ]
    return [
        (
            caption,
            (
                columns,
                [
                    [
                        f"{i + 1}  {name}",
                        *("–" if i == j else write(value) for j, value in enumerate(matrix[i])),
                    ]
                    for i, name in enumerate(names)
                ],
            ),
        )
        for matrix, write, caption in tables
    ]


def _spectra(result: Json) -> list[Chart]:
    """Charts the singular values of each pack, relative to the largest of their site: medians over the
    sites.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for index, name in enumerate(_names(result)):
        spectra = [site["spectra"][index]["values"] for site in result["sites"]]
        curves = [[value / values[0] for value in values] for values in spectra if values]
        columns = list(zip_longest(*curves, fillvalue=0.0))
        lines[name] = [(at, median_low(column)) for at, column in enumerate(columns, 1)]
    return line_charts("Spectra", lines, log=True)
