"""Evaluation: what is measured is what a bundle answers, and the figures are those of the field's libraries on the
same predictions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from notebooks import page_in_notebook
from scipy import stats
from sklearn import metrics

from adapterpack import evaluate, load, run, train
from adapterpack.cli.main import main
from adapterpack.errors import AdapterpackError, ConfigError, UnknownAdapter
from adapterpack.evaluating.evaluation import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    EvaluationRow,
    Judgement,
    RowReply,
)
from adapterpack.evaluating.measures import draw, estimate_of, ratio
from adapterpack.tasks.data.problems import ANY, NUMBER, ONE, Labels, ProblemType

Bundle = Callable[[str, str], Path]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def tickets(count: int = 24) -> list[dict[str, Any]]:
    dice = np.random.default_rng(3)
    return [
        {"text": " ".join(f"w{word}" for word in dice.integers(0, 60, 5)), "label": "xyz"[dice.integers(3)]}
        for _ in range(count)
    ]


def judged(
    kind: str, expected: Sequence[Any], results: Sequence[Any], labels: Labels | None = None
) -> tuple[Judgement, dict[str, float]]:
    """The judgement of given answers, and its measures on all rows."""
    rows = [EvaluationRow(at, at, (), "", right) for at, right in enumerate(expected, 1)]
    replies = [RowReply([one]) for one in results]
    model = EvaluatedModel(None, None, labels, 0)  # type: ignore[arg-type] # a judge of answers runs nothing
    found = EVALUATIONS[kind].judge(AnsweredRows(rows, replies, None, model))
    whole = np.ones(len(rows), int)
    return found, {one.name: float(one.value(whole)) for one in found.measures}


def test_the_measures_are_those_of_the_answers_that_run_gives(bundle_of: Bundle, tmp_path: Path) -> None:
    rows, bundle = tickets(), bundle_of("bert", "bank")
    found = evaluate(bundle, data=write(tmp_path / "rows.jsonl", rows), adapters=["alpha"])
    assert "<h1>Evaluation of" in page_in_notebook(found)
    answers = [
        row["label"] for row in run(bundle, [{"text": row["text"]} for row in rows], adapters=["alpha"])
    ]
    right = [row["label"] for row in rows]
    assert found.models[0].judgement.answers == answers
    assert found.measures["alpha"] == {
        "accuracy": pytest.approx(metrics.accuracy_score(right, answers)),
        "macro_f1": pytest.approx(metrics.f1_score(right, answers, average="macro")),
    }
    assert found.not_measured == {"base": "it has no trained head for this task"}
    labels, counts = found.models[0].judgement.confusion or ((), np.zeros(0))
    assert counts.tolist() == metrics.confusion_matrix(right, answers, labels=labels).tolist()


def test_labels_and_numbers_are_measured_as_by_sklearn_and_scipy() -> None:
    dice = np.random.default_rng(0)
    names = tuple("abcde")

    def of(problem: ProblemType, expected: Sequence[Any], logits: np.ndarray) -> dict[str, float]:
        names = ("score",) if problem is NUMBER else tuple("abcde")
        results = [problem.score(row, names) for row in logits]
        return judged("labels-of-texts", expected, results, Labels(names, problem))[1]

    logits, right = dice.normal(size=(40, 5)), dice.integers(0, 4, 40)  # no row of label e
    one = of(ONE, [names[at] for at in right], logits)
    assert one["macro_f1"] == pytest.approx(metrics.f1_score(right, logits.argmax(1), average="macro"))
    wanted = dice.random((40, 5)) < 0.4
    several = of(ANY, [[name for name, has in zip(names, row, strict=True) if has] for row in wanted], logits)
    for name, average in (("f1", "micro"), ("macro_f1", "macro")):
        assert several[name] == pytest.approx(metrics.f1_score(wanted, logits >= 0, average=average))
    assert several["accuracy"] == pytest.approx(metrics.accuracy_score(wanted, logits >= 0))
    numbers = (logits[:, 0] + dice.normal(size=40)).round(1)
    number = of(NUMBER, numbers.tolist(), logits.round(1)[:, :1])
    assert number["mse"] == pytest.approx(metrics.mean_squared_error(numbers, logits.round(1)[:, 0]))
    for name in ("pearson", "spearman"):
        expected = getattr(stats, f"{name}r")(numbers, logits.round(1)[:, 0]).statistic
        assert number[name] == pytest.approx(expected)


def test_intervals_are_those_of_the_bootstrap() -> None:
    """Against scipy's, whose draws are others: a mean of 200 rows has both ends within a tenth of its width."""
    right = (np.random.default_rng(1).random(200) < 0.7).astype(float)
    ours = estimate_of(draw(ratio("accuracy", right), 200, 1000))
    theirs = stats.bootstrap((right,), np.mean, n_resamples=2000, method="percentile", random_state=0)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.value == pytest.approx(right.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=width / 10)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=width / 10)


def test_the_command_writes_a_table_a_page_and_every_answer(bundle_of: Bundle, tmp_path: Path) -> None:
    data, page, out = write(tmp_path / "rows.jsonl", tickets()), tmp_path / "p.html", tmp_path / "a.jsonl"
    command = ["evaluate", str(bundle_of("bert", "bank")), "--data", data, "--adapter", "alpha"]
    shown = CliRunner().invoke(main, [*command, "--html", str(page), "--output", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "accuracy" in shown.output and "not measured: base" in shown.output
    assert "Confusion of labels by alpha" in page.read_text("utf-8")
    answers = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [one["row"] for one in answers] == list(range(1, 25))
    again = CliRunner().invoke(main, [*command, "--output", str(out)])
    assert again.exit_code == 1 and "--output" in again.stderr
    result = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    right = np.mean([one["answer"] == one["expected"] for one in answers])
    assert result["models"][0]["measures"]["accuracy"]["value"] == pytest.approx(right)
    assert result["models"][0]["worst"][0]["measures"]["right"] == 0


@pytest.mark.parametrize(
    ("rows", "adapters", "kind", "said"),
    [
        ([{"text": "w1"}], None, ConfigError, "needs the columns text and label"),
        ([], None, ConfigError, "empty"),
        ([{"text": "w1", "label": "q"}], ["alpha"], ConfigError, "expected x, y, z, found q"),
        ([{"text": "w1", "label": "x"}], ["alhpa"], UnknownAdapter, "alpha"),
        ([{"text": 5, "label": "x"}], ["alpha"], ConfigError, "a row without text"),
    ],
)
def test_what_cannot_be_measured_is_said_first(
    bundle_of: Bundle,
    tmp_path: Path,
    rows: list[dict[str, Any]],
    adapters: list[str] | None,
    kind: type[AdapterpackError],
    said: str,
) -> None:
    with pytest.raises(kind, match=said):
        evaluate(bundle_of("bert", "bank"), data=write(tmp_path / "rows.jsonl", rows), adapters=adapters)


def test_a_folded_bundle_is_its_adapter(bundle_of: Bundle, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", tickets())
    found = evaluate(bundle_of("bert", "folded"), data=data)
    bank = evaluate(bundle_of("bert", "bank"), data=data, adapters=["alpha"])
    assert found.measures == bank.measures
    with pytest.raises(ConfigError, match="takes no sampling parameters"):
        evaluate(bundle_of("bert", "folded"), data=data, temperature=1.0)


def test_rows_that_cannot_be_read_or_run_are_left_out_on_request(bundle_of: Bundle, tmp_path: Path) -> None:
    rows = [*tickets(4), {"text": "w1", "label": "q"}, {"text": "w1 " * 300, "label": "x"}]
    data = write(tmp_path / "rows.jsonl", rows)
    found = evaluate(bundle_of("bert", "bank"), data=data, adapters=["alpha"], on_bad_row="skip")
    assert len(found.rows) == 4
    assert [f"row {number}" in reason for number, reason in zip((5, 6), found.bad_rows, strict=True)] == [
        True
    ] * 2


def test_a_base_with_packs_takes_the_place_of_a_bundle(
    base_of: Callable[[str], Path],
    pack_of: Callable[[str, str], Path],
    bundle_of: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once it is exported, the figures are those of a bundle; so are those of a pack that is loaded into one."""
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "rows.jsonl", tickets())
    expected = evaluate(bundle_of("bert", "bank"), data=data, adapters=["alpha"]).measures["alpha"]
    assert evaluate(base_of("bert"), [pack_of("bert", "alpha")], data=data).measures["alpha"] == expected
    again = load(pack_of("bert", "alpha"), "again")
    assert evaluate(bundle_of("bert", "bank"), [again], data=data).measures == {"again": expected}


def test_an_adapter_that_was_trained_on_the_data_is_named(
    base_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    data, base, packs = write(tmp_path / "rows.jsonl", tickets()), base_of("bert"), tmp_path / "packs"
    other = write(tmp_path / "other.jsonl", tickets()[:6])
    task = {"model_name_or_path": str(base), "task": "text-classification", "max_steps": 1}
    for name, file in (("seen", data), ("new", other)):
        train({**task, "train_file": file, "output_dir": str(packs / name), "method": "lora"})
    shown = CliRunner().invoke(
        main, ["evaluate", str(base), str(packs / "seen"), str(packs / "new"), "--data", data]
    )
    assert shown.exit_code == 0, shown.output
    assert "seen was trained on this data" in shown.output and "new was trained" not in shown.output
    assert evaluate(base, [packs / "seen", packs / "new"], data=other).trained_on == ["new"]


def test_columns_are_read_before_a_base_is_exported(
    base_of: Callable[[str], Path],
    pack_of: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "rows.jsonl", [{"message": "w1 w2", "label": "x"}])
    with pytest.raises(ConfigError, match="needs the columns text and label"):
        evaluate(base_of("bert"), [pack_of("bert", "alpha")], data=data)
    assert not [*tmp_path.glob("cache/exports/*")]


def test_adapters_with_other_labels_than_the_data_are_named(bundle_of: Bundle, tmp_path: Path) -> None:
    found = evaluate(bundle_of("bert", "bank"), data=write(tmp_path / "rows.jsonl", tickets()))
    assert [*found.measures] == ["alpha"]
    assert "expected p, q, r, s, t" in found.not_measured["beta"]
