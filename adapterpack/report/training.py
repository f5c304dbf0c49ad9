"""Renders the pages of ``adapterpack train``: the losses of a training, and the resulting adapters; or how
far it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..manifest import settings_of
from ..readable import count, figure, seconds, size
from .chart import TONES, Chart, Points, line_charts
from .inspection import list_facts
from .page import Card, render

if TYPE_CHECKING:
    from ..training.loop.steps import Step

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
        evaluations=_charts(
            _evaluations({str(pack["name"]): pack["training"].get("evaluations", ()) for pack in packs})
        ),
        others=(),
        samples=(),
        packs=[
            {
                "name": pack["name"],
                "facts": list_facts({key: pack[key] for key in _TOLD if key in pack}),
                "metrics": [
                    [
                        one.get("name"),
                        figure(one.get("value"), ".4g"),
                        count(one.get("n")),
                        one.get("dataset"),
                    ]
                    for one in pack["metrics"]
                ],
                "settings": [fact for fact in list_facts(settings_of(pack["training"])) if fact[1] != "none"],
            }
            for pack in packs
        ],
    )


def live_report(steps: Mapping[str, Step], losses: Mapping[str, Points]) -> str:
    """Writes how far trainings are as a page: ``steps`` has the last step of each adapter, ``losses`` all
    steps by number, and the loss of each.
    """
    *_, (name, now) = steps.items() or [("", None)]
    return render(
        "train.html.jinja",
        names=", ".join(losses),
        figures=now
        and [
            Card("step", f"{now.done:,}", f"of {now.total:,}, {name}"),
            Card("loss", figure(now.loss, ".4g"), "of the last steps"),
            *([Card("speed", f"{now.speed:,.0f}", "tokens a second")] if now.speed else []),
            Card("time left", seconds(now.left)),
        ],
        charts=line_charts("Loss", losses),
        evaluations=_charts(_evaluations({name: step.evaluations for name, step in steps.items()})),
        others=_charts(
            _evaluations(
                {
                    name: [
                        {
                            key: value
                            for key, value in entry.items()
                            if key == "step" or key.startswith(("learning_rate", "reward"))
                        }
                        for entry in step.log
                    ]
                    for name, step in steps.items()
                }
            )
        ),
        samples=[
            [name, asked, said]
            for name, step in steps.items()
            for asked, said in next((one["samples"] for one in reversed(step.log) if "samples" in one), ())
        ],
        packs=(),
    )


def _charts(measures: Mapping[str, Mapping[str, Points]]) -> list[tuple[str, Chart]]:
    """Returns the charts of measures, each with its title."""
    return [
        (title, chart)
        for measure, values in measures.items()
        for title in [measure.capitalize().replace("_", " ")]
        for chart in line_charts(title, values)
    ]


def _evaluations(
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, dict[str, Points]]:
    """Returns metric -> adapter -> values by step, for adapters that were evaluated more than once."""
    metrics: dict[str, dict[str, Points]] = {}
    for name, every in evaluations.items():
        if len(every) > 1:
            for metric in dict.fromkeys(key for one in every for key in one if key != "step"):
                values = [(one["step"], one[metric]) for one in every if metric in one]
                metrics.setdefault(metric, {})[name] = values
    return metrics


def _figures(pack: Mapping[str, Any], many: bool) -> list[Card]:
    training = pack["training"]
    place = f", {pack['name']}" if many else ""
    return [
        Card(
            f"final loss{place}",
            figure(training.get("final_loss"), ".4g"),
            f"after {count(training.get('steps'))} steps",
        ),
        *(
            Card(
                f"{one.get('name')}{place}", figure(one.get("value"), ".4g"), f"on {count(one.get('n'))} rows"
            )
            for one in pack["metrics"][:1]
        ),
        Card(f"pack{place}", size(pack.get("bytes")), f"{count(pack.get('parameters'))} numbers"),
    ]
