"""What the logits of a head mean: one of several labels, any number of labels, or a number; and how each is
learned, scored and evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError, excerpt, require_among
from ...io import Config
from .rows import Result
from .scores import any_of, score_labels, score_value

IGNORED = -100
"""The label of a position that the loss ignores."""
LABEL_COLUMNS = ("label", "labels")
"""The names of the label column in data sets; the first one present is used."""
_LIKELY = 0.5
"""The probability from which a label counts as one of the row's labels."""


@dataclass(frozen=True)
class ProblemType:
    """How the labels of a head are read, learned, scored and evaluated.

    Args:
        name: the ``problem_type`` in transformers' configs.
        recognizes: the labels of all rows -> whether they are of this kind.
        names: (the labels of all rows, their source) -> the names of the logits, in order.
        target: (a row's label, the names) -> the training target; raises KeyError for an unknown label.
        score: (logits of one row, the names) -> the result for the row.
        metrics: (logits of all rows, their targets) -> metric -> value.
    """

    name: str
    recognizes: Callable[[Sequence[Any]], bool]
    names: Callable[[Sequence[Any], object], list[str]]
    target: Callable[[Any, Sequence[str]], Any]
    score: Callable[[np.ndarray, Sequence[str]], Result]
    metrics: Callable[[np.ndarray, np.ndarray], Mapping[str, float]]


class Labels(NamedTuple):
    """The names of a head's logits, in order, and what the logits mean."""

    names: tuple[str, ...]
    problem: ProblemType

    def target(self, value: Any, where: object) -> Any:
        """Returns the training target of a row with this label.

        Raises:
            ConfigError: the label is missing, or is not one of the names.
        """
        require_label(value, where)
        try:
            return self.problem.target(value, self.names)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                "a label that the training data does not have",
                where=where,
                expected=", ".join(self.names),
                found=value,
            ) from error


def number_labels(count: int) -> tuple[str, ...]:
    """Returns names for unnamed labels, as transformers generates them.

    Example:
        >>> number_labels(2)
        ('LABEL_0', 'LABEL_1')
    """
    return tuple(f"LABEL_{place}" for place in range(count))


def require_label(value: Any, where: object) -> None:
    """Checks that a row has a label.

    Raises:
        ConfigError: the row has no label.
    """
    if value is None or value == "":
        raise ConfigError("a row without a label", where=where)


def labels_in(values: Sequence[Any], where: object, problem: str | None = None) -> Labels:
    """Returns the labels that occur in rows, sorted by name (numbers numerically); without ``problem``, the
    values determine the problem.

    Raises:
        ConfigError: a row has no label, there are too few distinct labels, or a label does not fit the
            problem.
        UnknownName: there is no such problem.

    Example:
        >>> labels_in(["no", "yes", "no"], "here").names, labels_in([["b"], ["a", "b"]], "here").problem.name
        (('no', 'yes'), 'multi_label_classification')
    """
    for number, label in enumerate(values):
        require_label(label, f"{where}, row {number + 1}")
    kind = (
        get_problem(problem) if problem else next(one for one in PROBLEMS.values() if one.recognizes(values))
    )
    return Labels(tuple(kind.names(values, where)), kind)


def get_problem(name: str) -> ProblemType:
    """Returns the problem with that name.

    Raises:
        UnknownName: no problem has that name.
    """
    require_among("unknown problem_type", name, PROBLEMS)
    return PROBLEMS[name]


def problem_in(config: Config) -> str:
    """Returns the problem that a model's config names; by default, one label of several.

    Example:
        >>> problem_in({"problem_type": None}), problem_in({"problem_type": "regression"})
        ('single_label_classification', 'regression')
    """
    name = config.get("problem_type")
    return name if isinstance(name, str) and name in PROBLEMS else ONE.name


def _label_names(values: Iterable[Any], where: Callable[[int], str]) -> list[str]:
    """Returns the distinct labels as text: numbers in numerical order, then strings."""
    distinct = set()
    for number, label in enumerate(values):
        if not isinstance(label, str | int | bool) and not (isinstance(label, float) and label.is_integer()):
            raise ConfigError(
                "a label must be one text or whole number",
                where=where(number),
                found=excerpt(label),
                remedy="problem_type: regression learns numbers, multi_label_classification lists of labels",
            )
        distinct.add(label)
    ordered = sorted(distinct, key=lambda label: (isinstance(label, str), label))
    return list(dict.fromkeys(map(str, ordered)))


def _several(values: Sequence[Any], where: object) -> list[str]:
    labels = _label_names(values, lambda number: f"{where}, row {number + 1}")
    if len(labels) < 2:
        raise ConfigError(
            "the data has too few different labels",
            where=where,
            expected="at least two labels",
            found=", ".join(labels),
        )
    return labels


def _sets(values: Sequence[Any], where: object) -> list[str]:
    for number, value in enumerate(values):
        if not isinstance(value, list | tuple):
            raise ConfigError(
                "the labels of a row must be a list",
                where=f"{where}, row {number + 1}",
                found=excerpt(value),
            )
    labels = _label_names((label for value in values for label in value), lambda _: str(where))
    if not labels:
        raise ConfigError(
            "the data has too few different labels",
            where=where,
            expected="a row with a label",
            found="empty lists",
        )
    return labels


def _numbers(values: Sequence[Any], where: object) -> list[str]:
    for number, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(
                "a regression learns numbers, and this is not one",
                where=f"{where}, row {number + 1}",
                found=excerpt(value),
            )
    return ["score"]


def _among(value: Any, names: Sequence[str]) -> tuple[float, ...]:
    wanted = {_index(label, names) for label in value}
    return tuple(float(number in wanted) for number in range(len(names)))


def _index(value: Any, names: Sequence[str]) -> int:
    return {name: number for number, name in enumerate(names)}[str(value)]


def _first(outputs: Any) -> np.ndarray:
    """Returns the logits among a model's outputs."""
    return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)


def _accuracy(outputs: Any, targets: np.ndarray) -> dict[str, float]:
    """Returns the share of rows, or of labelled tokens, whose largest logit is that of their label, and the
    mean F1 of the labels that occur.
    """
    learned = targets != IGNORED
    pair = np.argmax(_first(outputs), -1)[learned], targets[learned]
    hits = [[side == label for side in pair] for label in np.union1d(*pair)]
    f1 = [2 * (given & wanted).sum() / (given.sum() + wanted.sum()) for given, wanted in hits]
    return {"accuracy": float((pair[0] == pair[1]).mean()), "macro_f1": float(np.mean(f1))}


def _agreement(outputs: Any, targets: np.ndarray) -> dict[str, float]:
    """Returns the share of rows with exactly the right labels, and F1 over all labels of all rows."""
    chosen = 1 / (1 + np.exp(-_first(outputs))) >= _LIKELY
    wanted = targets > _LIKELY
    right = (chosen & wanted).sum()
    both = chosen.sum() + wanted.sum()
    return {
        "accuracy": float((chosen == wanted).all(-1).mean()),
        "f1": float(2 * right / both) if both else 1.0,
    }


def _distance(outputs: Any, targets: np.ndarray) -> dict[str, float]:
    """Returns the mean squared error, and Pearson's correlation if it is defined."""
    values = _first(outputs).reshape(-1).astype(np.float64)
    wanted = targets.reshape(-1).astype(np.float64)
    # Pearson's correlation is undefined for constant values.
    spread = values.std() * wanted.std()
    return {
        "mse": float(((values - wanted) ** 2).mean()),
        **({"pearson": float(np.corrcoef(values, wanted)[0, 1])} if spread else {}),
    }


def _kinds(values: Sequence[Any]) -> Iterator[type]:
    return map(type, values)


ANY = ProblemType(
    "multi_label_classification",
    lambda values: any(kind in {list, tuple} for kind in _kinds(values)),
    _sets,
    _among,
    lambda logits, names: any_of(logits, names, _LIKELY),
    _agreement,
)
NUMBER = ProblemType(
    "regression",
    lambda values: set(_kinds(values)) == {float} and not all(map(float.is_integer, values)),
    _numbers,
    lambda value, _: float(value),
    score_value,
    _distance,
)
ONE = ProblemType(
    "single_label_classification", lambda values: True, _several, _index, score_labels, _accuracy
)
PROBLEMS: dict[str, ProblemType] = {problem.name: problem for problem in (ANY, NUMBER, ONE)}
"""Name -> problem. If labels must decide, the first problem that recognizes them is used."""
MARKED = frozenset({ANY.name, NUMBER.name})
"""The problems that a pack lists in ``must_understand``, because readers that only know one label of several
would misinterpret the logits.
"""
