"""The page of ``adapterpack audit --html``: what each part of ``templates/audit.html.jinja`` shows of an
audit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from markupsafe import Markup

from ..io.readable import count, number, percent
from .audit_map import Grid, grid
from .audit_sites import Result, decimal, effective_rank, extreme, share, short, worst
from .heat import heat_map
from .key_figures import Card
from .lines import Line, spectrum_lines
from .rendering import render

_TONES = ("c1", "c2", "c3", "c0")
_LISTED, _MAPPED = 15, 4
Chart = tuple[Markup, str]
"""A chart and its caption."""


def audit_report(result: Result) -> str:
    """What ``Audit.to_json()`` gives as one self-contained HTML page; parts without figures are left out."""
    total, verdict, names = result["total"], result["verdict"], ", ".join(_names(result))
    options = "".join(f" --weight {weight:.3g}" for weight in verdict["weights"] or ()) + (
        " --base BASE" if result["base"] else ""
    )
    columns, rows = worst(result, _LISTED)
    approximated = [site["approximation"] for site in result["sites"] if site["approximation"]]
    return render(
        "audit.html.jinja",
        title=f"Audit of {names}" if len(names) < 80 else f"Audit of {len(result['packs'])} packs",
        packs=result["packs"],
        sites=len(result["sites"]),
        verdict=verdict,
        figures=_key_figures(result) if total else (),
        commands=[f"adapterpack compose PACK... --rule {rule}{options} -o OUT" for rule in verdict["rules"]],
        changes=_changes(result) if total else {},
        pairs=_pairs(result) if total and len(result["packs"]) > 1 else (),
        map=_map(result) if len(result["sites"]) > 1 else {},
        spectra=_spectra(result),
        truncation=_truncation(total["truncation"]) if total and total["truncation"] else {},
        folds=[
            [dtype, percent(loss["relative_error"]), percent(loss["kept"])]
            for dtype, loss in total["fold"].items()
        ]
        if total
        else (),
        worst={"columns": columns, "rows": rows, "shown": min(_LISTED, len(result["sites"]))},
        whole=[
            [module["path"], ", ".join(module["packs"]), count(module["numbers"]), module["treatment"]]
            for module in result["whole"]
        ],
        skipped={
            "rows": [[site["pack"], site["path"], site["reason"]] for site in result["skipped"][:_LISTED]],
            "all": len(result["skipped"]),
        },
        sampled=sum(bool(site["sampled"]) for site in result["sites"]),
        approximated={"sites": len(approximated), "error": share(max(approximated))} if approximated else {},
    )


def _names(result: Result) -> list[str]:
    return [str(pack["name"]) for pack in result["packs"]]


def _key_figures(result: Result) -> list[Card]:
    total, many = result["total"], len(result["packs"]) > 1
    relative = number(total["combined"]["relative_norm"])
    cards = [
        Card(
            "sites",
            f"{len(result['sites']):,}",
            f"of {len(result['packs'])} packs" if many else "of one pack",
        ),
        Card(
            "size of the sum" if many else "size of the change",
            short(total["combined"]["norm"]) if relative is None else share(relative),
            "Frobenius norm" if relative is None else "of the weights' norm",
        ),
    ]
    if many:
        cards.append(
            Card(
                "strongest cosine", decimal(extreme(total["cosine"])), "1 the same, 0 unrelated, -1 opposite"
            )
        )
        cards.append(
            Card("sign conflict", percent(extreme(total["conflict"]["pairs"], 0.5)), "50 % is chance")
        )
    for dtype, loss in list(total["fold"].items())[:1]:
        cards.append(
            Card(f"lost in {dtype}", percent(loss["relative_error"]), "by rounding, if folded into the base")
        )
    return cards


def _changes(result: Result) -> Mapping[str, Any]:
    total, many, based = result["total"], len(result["packs"]) > 1, result["base"] is not None
    columns = [
        "pack",
        "method",
        "sites",
        *(["weight"] if many else []),
        "norm",
        *(["of base"] if based else []),
        "effective rank",
        *(["kept by the sum"] if many else []),
    ]
    rows = []
    for index, pack in enumerate(result["packs"]):
        rows.append(
            [
                pack["name"],
                pack["method"],
                f"{pack['sites']:,}",
                *([f"{pack['weight']:.3g}"] if many else []),
                short(total["norms"][index]),
                *([share(total["relative_norms"][index])] if based else []),
                decimal(effective_rank(result, index), 1),
                *([decimal(total["retained"][index])] if many else []),
            ]
        )
    return {"columns": columns, "rows": rows, "numbers": range(2, len(columns))}


def _truncation(losses: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"columns": [f"rank {rank}" for rank in losses], "losses": list(map(share, losses.values()))}


def _pairs(result: Result) -> list[Chart]:
    names, total = _names(result), result["total"]
    rows = [f"{index + 1}  {name}" for index, name in enumerate(names)]
    columns = [str(index + 1) for index in range(len(names))]
    percentages = partial(
        heat_map, middle=0.5, shown=lambda value: f"{100 * value:.0f} %", tones=("c2", "c1")
    )
    charts = []
    for title, matrix, caption, draw in (
        (
            "Cosine of the changes",
            total["cosine"],
            "Cosine of the changes: blue agrees, orange opposes, pale is unrelated.",
            heat_map,
        ),
        (
            "Sign conflict",
            total["conflict"]["pairs"],
            "Sign conflict: the share of what two packs change in common at which their signs differ. "
            "Orange is above chance (50 %), blue below.",
            percentages,
        ),
        (
            "Shared outputs",
            total["overlap"]["outputs"],
            "Shared outputs: how far two packs write into the same directions.",
            heat_map,
        ),
        (
            "Shared inputs",
            total["overlap"]["inputs"],
            "Shared inputs: how far two packs read the same directions.",
            heat_map,
        ),
    ):
        blank = [[None if i == j else value for j, value in enumerate(line)] for i, line in enumerate(matrix)]
        charts.append((draw(title, rows, columns, blank, written=True), caption))
    return charts


def _map(result: Result) -> Mapping[str, Any]:
    layers, pairs, based = grid(result["sites"]), len(result["packs"]) > 1, result["base"] is not None
    charts = _pair_maps(result, layers) if pairs else []
    key, written = ("relative_norms", share) if based else ("norms", short)
    largest = (
        max((value for site in result["sites"] for value in site[key] if value is not None), default=1.0)
        or 1.0
    )
    for index, name in enumerate(_names(result)[:_MAPPED]):
        caption = (
            f"The size of the change of {name}"
            + (", relative to the weight that it changes." if based else ".")
            + f" The strongest colour is {written(largest)}"
            + (", of all packs." if pairs else ".")
        )
        charts.append(
            _cells(layers, f"Size of {name}", partial(_of_pack, key, index), caption, largest, written)
        )
    for dtype in result["dtypes"][:1]:
        charts.append(
            _cells(
                layers,
                f"Lost in {dtype}",
                partial(_rounding, dtype),
                f"The relative error of the change when it is folded into the base in {dtype}.",
                1.0,
                percent,
            )
        )
    return {"charts": charts, "shortened": len(layers.rows) if layers.cut else None}


def _pair_maps(result: Result, layers: Grid) -> list[Chart]:
    # What cancels in the sum of as many unrelated changes of one size.
    chance = 1 - 1 / math.sqrt(len(result["packs"]))
    return [
        _cells(
            layers,
            "Cosine",
            lambda site: extreme(site["cosine"]),
            "Cosine of the pair that is farthest from unrelated: blue agrees, orange opposes.",
            1.0,
        ),
        _cells(
            layers,
            "Interference",
            lambda site: site["interference"]["relative"],
            "Singular task interference, relative to the size of the changes: how far packs use the "
            "same inputs and outputs at once.",
        ),
        _cells(
            layers,
            "Cancelled",
            lambda site: site["conflict"]["cancelled"],
            "The share of all absolute values that cancels in the sum: orange is more than for unrelated "
            f"packs ({percent(chance)}), blue is less.",
            1.0,
            percent,
            middle=chance,
            tones=("c2", "c1"),
        ),
    ]


def _of_pack(key: str, index: int, site: Result) -> Any:
    return site[key][index]


def _rounding(dtype: str, site: Result) -> Any:
    return site["fold"].get(dtype, {}).get("relative_error")


def _cells(
    layers: Grid,
    title: str,
    value: Callable[[Result], Any],
    caption: str,
    high: float | None = None,
    shown: Callable[[float], str] = decimal,
    **options: Any,
) -> Chart:
    values = [[None if site is None else number(value(site)) for site in line] for line in layers.cells]
    sizes = [abs(cell) for line in values for cell in line if cell is not None]
    top = high if high is not None else max(sizes, default=1.0) or 1.0
    scale = "" if high is not None else f" The strongest colour is {shown(top)}."
    return (
        heat_map(title, layers.rows, layers.columns, values, high=top, shown=shown, **options),
        caption + scale,
    )


def _spectra(result: Result) -> list[Markup]:
    lines: list[Line] = []
    for index, name in enumerate(_names(result)):
        spectra = [site["spectra"][index]["values"] for site in result["sites"]]
        curves = [[value / values[0] for value in values] for values in spectra if values]
        if curves:
            longest = max(map(len, curves))
            columns = [
                sorted(curve[at] if at < len(curve) else 0.0 for curve in curves) for at in range(longest)
            ]
            low, middle, high = (
                [column[int(part * (len(column) - 1))] for column in columns] for part in (0.1, 0.5, 0.9)
            )
            lines.append(
                Line(name, middle, (low, high) if len(curves) > 2 else None, _TONES[len(lines) % len(_TONES)])
            )
    groups = [lines[start : start + 3] for start in range(0, len(lines), 3)]
    return [
        spectrum_lines(f"Spectra of {', '.join(line.label for line in group)}", group) for group in groups
    ]
