"""Renders the page and the table of ``adapterpack evaluate``."""

from __future__ import annotations

from ..io import Json
from ..readable import MISSING, figure, things
from .page import Table, render

_MOST_LABELS = 20
"""The most labels of a confusion map."""
_LONGEST = 2000
"""The most characters of a text."""


def evaluation_table(result: Json) -> Table:
    """Returns column names and rows: one row for each measure, one column for each model.

    Example:
        >>> accuracy = {"value": 0.5, "low": 0.25, "high": 0.75, "more_is_better": True}
        >>> evaluation_table({"models": [{"name": "base", "measures": {"accuracy": accuracy}}]})
        (['measure', 'base'], [['accuracy', '0.5 (0.25 to 0.75)']])
    """
    models = result["models"]
    names = dict.fromkeys(name for model in models for name in model["measures"])
    rows = [[name, *(_figure(model["measures"].get(name)) for model in models)] for name in names]
    return ["measure", *(model["name"] for model in models)], rows


def evaluation_report(result: Json) -> str:
    """Writes what ``Evaluated.to_json()`` gives as one self-contained HTML page."""
    models = result["models"]
    return render(
        "evaluation.html.jinja",
        title=f"Evaluation of {', '.join(model['name'] for model in models)}",
        about=f"{result['task']}, {things(result['rows'], 'row')} of {result['data']}",
        table=evaluation_table(result),
        maps=[_confusion_map(model) for model in models if model["confusion"]],
        worst=[
            (model["name"], [_row(row) for row in model["worst"] if not _is_right(row)]) for model in models
        ],
        not_measured=list(result["not_measured"].items()),
        bad_rows=result["bad_rows"],
        notes=[seen_note(name) for name in result["trained_on"]],
    )


def seen_note(adapter: str) -> str:
    """Says that an adapter knows the rows that it is measured on."""
    return f"{adapter} was trained on this data: how it answers to other rows is not measured"


def _is_right(row: Json) -> bool:
    return bool(row["expected"]) and row["answer"] == row["expected"]


def _figure(one: Json | None) -> str:
    if one is None or one["value"] is None:
        return MISSING
    if one["low"] is None:
        return figure(one["value"])
    return f"{figure(one['value'])} ({figure(one['low'])} to {figure(one['high'])}){_gain(one)}"


def _gain(one: Json) -> str:
    gain = one.get("gain")
    if gain is None or gain["low"] is None:
        return ""
    return ", better" if gain["low"] > 0 else ", worse" if gain["high"] < 0 else ""


def _confusion_map(model: Json) -> Json:
    """Returns the map of the labels that occur most, each cell with its count and its share of its row."""
    labels, counts = model["confusion"]["labels"], model["confusion"]["counts"]
    shown = sorted(sorted(range(len(labels)), key=lambda at: -sum(counts[at]))[:_MOST_LABELS])
    return {
        "name": model["name"],
        "labels": [labels[at] for at in shown],
        "left_out": len(labels) - len(shown),
        "rows": [
            (
                labels[at],
                [(counts[at][to], round(100 * counts[at][to] / max(sum(counts[at]), 1))) for to in shown],
            )
            for at in shown
        ],
    }


def _row(row: Json) -> list[tuple[str, str]]:
    """Returns what the page shows of a row: names and texts."""
    measures = ", ".join(
        f"{name.replace('_', ' ')} {figure(value)}" for name, value in row["measures"].items()
    )
    texts = (("asked", row["asked"]), ("right", row["expected"]), ("answer", row["answer"]))
    return [("row", f"{row['row']}: {measures}"), *((name, str(text)[:_LONGEST]) for name, text in texts)]
