"""Renders the page and the table of ``adapterpack quantize --compare``."""

from __future__ import annotations

from typing import Any

from ..io import Json
from ..readable import MISSING, figure, percent, size
from .page import Card, Table, render

_RIGHT = {"text-generation": "exact match"}


def comparison_table(result: Json) -> Table:
    """Returns column names and rows, one row for each form; omits columns that no form fills.

    Example:
        >>> form = {"scheme": "int4", "way": "attached", "bytes": 1000, "perplexity": 2.5, "right": None,
        ...     "agreement": 0.5, "decode": 9.0,
        ...         "prefill": None, "reason": None}
        >>> comparison_table({"task": "text-generation", "forms": [form]})  # doctest: +ELLIPSIS
        (['scheme', 'adapter', 'size', 'perplexity', 'agreement', 'tokens/s'], [['int4', 'attached', ...']])
    """
    columns: list[tuple[str, Any]] = [
        ("size", lambda form: size(form["bytes"])),
        ("perplexity", _perplexity),
        (_right(result), lambda form: percent(form["right"])),
        ("agreement", lambda form: percent(form["agreement"])),
        ("tokens/s", lambda form: figure(form["decode"], ".1f")),
        ("tokens/s read", lambda form: figure(form["prefill"], ".0f")),
    ]
    made = [form for form in result["forms"] if form["reason"] is None]
    columns = [(name, shown) for name, shown in columns if any(shown(form) != MISSING for form in made)]
    rows = [[form["scheme"], form["way"], *(shown(form) for _, shown in columns)] for form in made]
    return ["scheme", "adapter", *(name for name, _ in columns)], rows


def list_left_out(result: Json) -> list[tuple[str, str]]:
    """Lists the forms that could not be made, with the reasons."""
    return [
        (f"{form['scheme']}, {form['way']}", form["reason"])
        for form in result["forms"]
        if form["reason"] is not None
    ]


def comparison_report(result: Json) -> str:
    """Writes what ``Comparison.to_json()`` gives as one self-contained HTML page."""
    columns, rows = comparison_table(result)
    made = [form for form in result["forms"] if form["reason"] is None]
    name = result["base"] if result["adapter"] is None else f"{result['base']} with {result['adapter']}"
    return render(
        "comparison.html.jinja",
        title=f"Quantized forms of {name}",
        advice=result["advice"],
        figures=_cards(made),
        columns=columns,
        rows=rows,
        left_out=list_left_out(result),
        counted=f"{result['rows']:,} rows, {result['positions']:,} choices",
        rank=result["rank"],
        corrected=any(form["way"] == "compensated" for form in made),
        merged=any(form["way"] == "merged" for form in made),
    )


def _cards(made: list[Json]) -> list[Card]:
    first = made[0]
    others = made[1:]
    cards = [Card("float bundle", size(first["bytes"]), _quality(first))]
    if others:
        smallest = min(others, key=lambda form: form["bytes"])
        cards.append(Card("smallest", size(smallest["bytes"]), f"{_named(smallest)}: {_quality(smallest)}"))
        best = min(others, key=lambda form: form["perplexity"])
        cards.append(Card("nearest to float", size(best["bytes"]), f"{_named(best)}: {_quality(best)}"))
        fastest = max(others, key=_speed)
        cards.append(
            Card(
                "fastest at one row",
                f"{_speed(fastest):,.0f} tokens/s",
                f"{_named(fastest)}; float {_speed(first):,.0f}",
            )
        )
    return cards


def _named(form: Json) -> str:
    return str(form["scheme"]) if form["way"] == "float" else f"{form['scheme']} {form['way']}"


def _quality(form: Json) -> str:
    return f"perplexity {_perplexity(form)}"


def _perplexity(form: Json) -> str:
    """Formats the perplexity of a form with four digits, zeros among them."""
    return figure(form["perplexity"], "#.4g").rstrip(".")


def _right(result: Json) -> str:
    return _RIGHT.get(result["task"], "right labels")


def _speed(form: Json) -> float:
    return float(form["decode"] if form["decode"] is not None else form["prefill"])
