"""The page of ``adapterpack train --html``: the losses of a training, and what each adapter became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..io.readable import MISSING, count, number, size
from ..manifest.parts import settings_of
from .inspected import facts_of
from .key_figures import Card
from .lines import loss_lines
from .rendering import render

Values = Mapping[str, Sequence[tuple[int, float]]]
"""Adapter -> its steps by number, and a value at each, such as the loss."""
_TOGETHER = 3
"""Lines of one figure, as many as there are tones."""
_TOLD = ("path", "id", "method", "sites", "parameters", "bytes", "task")


def train_report(packs: Sequence[Mapping[str, Any]], losses: Values) -> str:
    """The packs of a training, as ``adapterpack train --json`` gives them, and its losses as one
    self-contained HTML page.

    Example:
        >>> pack = {"name": "a", "training": {"steps": 2, "final_loss": 0.5}, "metrics": []}
        >>> "polyline" in train_report([pack], {"a": [(1, 1.0), (2, 0.5)]})
        True
    """
    return render(
        "train.html.jinja",
        names=", ".join(str(pack["name"]) for pack in packs),
        figures=[card for pack in packs[:_TOGETHER] for card in _figures(pack, len(packs) > 1)],
        charts=_charts("Loss", losses),
        evaluations=[
            (metric, chart)
            for metric, values in _evaluations(packs).items()
            for chart in _charts(metric.capitalize(), values)
        ],
        long=any(len(steps) > 200 for steps in losses.values()),
        packs=[
            {
                "name": pack["name"],
                "facts": facts_of({key: pack[key] for key in _TOLD if key in pack}),
                "metrics": [
                    [
                        str(one.get("name")),
                        _figure(one.get("value")),
                        count(one.get("n")),
                        str(one.get("dataset")),
                    ]
                    for one in pack["metrics"]
                ],
                "settings": facts_of(settings_of(pack["training"])),
            }
            for pack in packs
        ],
    )


def _evaluations(packs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Metric -> adapter -> what it was at which step, of adapters that were evaluated more than once."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for pack in packs:
        every = pack["training"].get("evaluations", ())
        for evaluation in every if len(every) > 1 else ():
            for metric, value in evaluation.items():
                if metric != "step":
                    found.setdefault(metric, {}).setdefault(str(pack["name"]), []).append(
                        (evaluation["step"], value)
                    )
    return found


def _charts(what: str, values: Values) -> list[Markup]:
    """The values over the steps, of up to three adapters in one figure."""
    lines = [
        (name, [step for step, _ in points], [value for _, value in points])
        for name, points in values.items()
        if points
    ]
    groups = [lines[start : start + _TOGETHER] for start in range(0, len(lines), _TOGETHER)]
    return [loss_lines(f"{what} of {', '.join(name for name, _, _ in group)}", group) for group in groups]


def _figures(pack: Mapping[str, Any], many: bool) -> list[Card]:
    training, place = pack["training"], f", {pack['name']}" if many else ""
    cards = [
        Card(
            f"final loss{place}",
            _figure(training.get("final_loss")),
            f"after {count(training.get('steps'))} steps",
        )
    ]
    cards += [
        Card(f"{one.get('name')}{place}", _figure(one.get("value")), f"on {count(one.get('n'))} rows")
        for one in pack["metrics"][:1]
    ]
    return [*cards, Card(f"pack{place}", size(pack.get("bytes")), f"{count(pack.get('parameters'))} numbers")]


def _figure(value: object) -> str:
    found = number(value)
    return MISSING if found is None else f"{found:.4g}"
