"""What an evaluation found: the figures of each model, and every row's answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..io import Json
from ..notebook import Shown
from .evaluation import EvaluationRow, Judgement
from .measures import BootstrapEstimate, draw, estimate_of

WORST = 20
"""How many of a model's worst rows are listed."""


@dataclass(frozen=True)
class ModelFigures:
    """The figures of one adapter, or of the base.

    Args:
        name: the adapter's name; ``base`` for the base.
        pack: the id of its pack; None for the base.
        figures: measure -> its figure.
        gains: measure -> by how much it is better than the first model, on the same draws of rows.
        judgement: the figures of each row.
    """

    name: str
    pack: str | None
    figures: Mapping[str, BootstrapEstimate]
    gains: Mapping[str, BootstrapEstimate]
    judgement: Judgement

    def answer(self, row: EvaluationRow, at: int) -> Json:
        """Returns the answer to the row at a place, as JSON values."""
        judged = self.judgement
        measures = {name: float(values[at]) for name, values in judged.rows.items()}
        return {
            "row": row.number,
            "adapter": self.name,
            "asked": row.shown,
            "expected": row.expected,
            "answer": judged.answers[at],
            "measures": measures,
        }


@dataclass(frozen=True)
class Evaluated(Shown):
    """What :func:`adapterpack.evaluate` found.

    Args:
        data: the name of the data.
        task: the task.
        kind: the kind of evaluation.
        rows: the rows that all models answered.
        models: the figures of each model, the base first.
        not_measured: model -> why it was not measured.
        bad_rows: what is wrong with the rows that were left out.
        trained_on: the adapters that were trained on these files, by what their packs say: how they answer to
            other rows is not measured.
    """

    data: str
    task: str
    kind: str
    rows: Sequence[EvaluationRow]
    models: Sequence[ModelFigures]
    not_measured: Mapping[str, str]
    bad_rows: Sequence[str]
    trained_on: Sequence[str]

    def __repr__(self) -> str:
        return f"<Evaluated {self.data}: {self.measures}>"

    @property
    def measures(self) -> dict[str, dict[str, float | None]]:
        """Model -> measure -> value."""
        return {
            model.name: {name: figure.value for name, figure in model.figures.items()}
            for model in self.models
        }

    def answers(self) -> Iterator[Json]:
        """Yields the answer of every model to every row, with the measures of that row."""
        for at, row in enumerate(self.rows):
            yield from (model.answer(row, at) for model in self.models)

    def to_json(self) -> Json:
        """Returns the figures, and the worst rows of each model, as JSON values."""
        return {
            "data": self.data,
            "task": self.task,
            "kind": self.kind,
            "rows": len(self.rows),
            "models": [self._model(model) for model in self.models],
            "not_measured": dict(self.not_measured),
            "bad_rows": list(self.bad_rows),
            "trained_on": list(self.trained_on),
        }

    def _model(self, model: ModelFigures) -> Json:
        judged = model.judgement
        worst = np.argsort(-judged.badness, kind="stable")[:WORST]
        gains = {name: {"gain": gain._asdict()} for name, gain in model.gains.items()}
        return {
            "name": model.name,
            "pack": model.pack,
            "measures": {
                measure.name: {
                    **model.figures[measure.name]._asdict(),
                    "more_is_better": measure.more_is_better,
                    **gains.get(measure.name, {}),
                }
                for measure in judged.measures
            },
            "confusion": None
            if judged.confusion is None
            else {"labels": [*judged.confusion[0]], "counts": judged.confusion[1].tolist()},
            "worst": [model.answer(self.rows[at], at) for at in worst],
        }


def figures_of(
    judged: Mapping[str, tuple[str | None, Judgement]], rows: int, draws: int
) -> list[ModelFigures]:
    """Returns the figures of models, given as name -> pack and judgement."""
    found = []
    first = dict[str, np.ndarray]()
    for name, (pack, judgement) in judged.items():
        drawn = {one.name: draw(one, rows, draws) for one in judgement.measures}
        gains = {
            one.name: estimate_of((drawn[one.name] - first[one.name]) * (1 if one.more_is_better else -1))
            for one in judgement.measures
            if one.name in first
        }
        first = first or drawn
        figures = {key: estimate_of(values) for key, values in drawn.items()}
        found.append(ModelFigures(name, pack, figures, gains, judgement))
    return found
