"""Renders the page of ``adapterpack train --html``: the losses of a training, and the resulting adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..manifest.structs import settings_of
from ..readable import MISSING, count, number, size
from .chart import TONES, Points, line_charts
from .inspection import list_facts
from .page import Card, render

_TOLD = ("path", "id", "method", "sites", "parameters", "bytes", "task")


def train_report(packs: Sequence[Mapping[str, Any]], losses: Mapping[str, Points]) -> str:
    """Writes the packs of a training, as ``adapterpack train --json`` gives them, and its losses as one
    self-contained HTML page. ``losses`` has the steps of each adapter by number, and the loss of each.

    Example:
        >>> pack = {"name": "a", "training": {"steps": 2, "final_loss": 0.5}, "metrics": []}
        >>> "polyline" in train_report([pack], {"a": [(1, 1.0), (2, 0.5)]})
        True
    """
    return render(
        "train.html.jinja",
        names=", ".join(str(pack["name"]) for pack in packs),
        figures=[card for pack in packs[: len(TONES)] for card in _figures(pack, len(packs) > 1)],
        charts=line_charts("Loss", losses),
        evaluations=[
            (metric, chart)
            for metric, values in _evaluations(packs).items()
            for chart in line_charts(metric.capitalize(), values)
        ],
        packs=[
            {
                "name": pack["name"],
                "facts": list_facts({key: pack[key] for key in _TOLD if key in pack}),
                "metrics": [
                    [one.get("name"), _figure(one.get("value")), count(one.get("n")), one.get("dataset")]
                    for one in pack["metrics"]
                ],
                "settings": list_facts(settings_of(pack["training"])),
            }
            for pack in packs
        ],
    )


def _evaluations(packs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """Returns metric -> adapter -> values by step, for adapters that were evaluated more than once."""
    metrics: dict[str, dict[str, Points]] = {}
    for pack in packs:
        every = pack["training"].get("evaluations", ())
        if len(every) > 1:
            for metric in dict.fromkeys(key for one in every for key in one if key != "step"):
                values = [(one["step"], one[metric]) for one in every if metric in one]
                metrics.setdefault(metric, {})[str(pack["name"])] = values
    return metrics


def _figures(pack: Mapping[str, Any], many: bool) -> list[Card]:
    training, place = pack["training"], f", {pack['name']}" if many else ""
    return [
        Card(
            f"final loss{place}",
            _figure(training.get("final_loss")),
            f"after {count(training.get('steps'))} steps",
        ),
        *(
            Card(f"{one.get('name')}{place}", _figure(one.get("value")), f"on {count(one.get('n'))} rows")
            for one in pack["metrics"][:1]
        ),
        Card(f"pack{place}", size(pack.get("bytes")), f"{count(pack.get('parameters'))} numbers"),
    ]


def _figure(value: object) -> str:
    figure = number(value)
    return MISSING if figure is None else f"{figure:.4g}"
