"""What each task learns from its data by ``adapterpack train``, and that torch, pipelines of transformers and
bundles read it alike.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typed_bert import typed_bert

import adapterpack
from adapterpack import Pack, attach, compose, detach, evaluate, export, load, merge, run, train
from adapterpack.errors import ConfigError, FormatError, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.tasks.data.problems import PROBLEMS, labels_in
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

TEXT = "text-classification"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The data sets' cache in a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield folder


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(seed: int, count: int) -> list[tuple[str, list[bool]]]:
    """Texts of some of three kinds of words among others, and which kinds are in each."""
    dice, made = random.Random(seed), []
    for number in range(count):
        kinds = [bool(number >> bit & 1) for bit in range(3)]
        words = [
            f"w{dice.randrange(20 * kind, 20 * kind + 4)}"
            for kind, there in enumerate(kinds)
            if there
            for _ in range(2)
        ]
        words += [f"w{dice.randrange(70, 90)}" for _ in range(2)]
        dice.shuffle(words)
        made.append((" ".join(words), kinds))
    return made


LABELS: dict[str, Any] = {
    "multi_label_classification": lambda kinds: [
        name for name, there in zip(("new", "odd", "red"), kinds, strict=True) if there
    ],
    "regression": lambda kinds: 0.75 * kinds[0] - 0.5 * kinds[2],
    "single_label_classification": lambda kinds: ("no", "yes")[kinds[0]],
}
"""Problem -> the label of a text with these kinds of words."""
CHANCE = {
    "multi_label_classification": ("f1", 0.7),
    "regression": ("pearson", 0.7),
    "single_label_classification": ("accuracy", 0.85),
}
"""Problem -> a metric, and what a pack that has learned exceeds on rows that it has not seen."""


@pytest.fixture(scope="module")
def heads(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pack]:
    """One pack for each problem, trained on the same texts."""
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    packs = {}
    for problem, label in LABELS.items():
        folder = tmp_path_factory.mktemp(problem[:6])
        files = [
            write(
                folder / f"{name}.jsonl",
                [{"text": text, "label": label(kinds)} for text, kinds in texts(seed, count)],
            )
            for name, seed, count in (("rows", 0, 96), ("held-out", 1, 48))
        ]
        (packs[problem],) = train(
            {
                "model_name_or_path": str(tiny_bert),
                "task": TEXT,
                "train_file": files[0],
                "eval_file": files[1],
                "output_dir": str(folder / problem[:6]),
                "learning_rate": 2e-2,
                "max_steps": 48,
                "r": 4,
                "max_length": 32,
                "per_device_train_batch_size": 16,
            }
        )
    return packs


def test_each_problem_is_told_by_the_labels_and_learned(heads: dict[str, Pack], tiny_bert: Path) -> None:
    """Lists of labels, numbers with a fraction, and one label of several: each is learned with its own loss,
    on rows that were not seen; the pack says which it is, and a reader that would take every head for the
    last kind refuses the other two.
    """
    for problem, pack in heads.items():
        metrics = {metric["name"]: metric["value"] for metric in pack.manifest.metrics}
        name, least = CHANCE[problem]
        assert metrics[name] > least, (problem, metrics)
        assert pack.manifest.problem == problem
        assert adapterpack.validate(pack.path, tiny_bert).valid
    assert heads["regression"].manifest.must_understand == ("regression",)
    assert heads["single_label_classification"].manifest.must_understand == ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "FEATURES", frozenset({"int8", "methods", "composition"}))
        load(heads["single_label_classification"].path)
        for problem in ("multi_label_classification", "regression"):
            with pytest.raises(FormatError, match=f"features that this version does not have.*{problem}"):
                load(heads[problem].path)


def test_pipelines_show_the_labels_of_the_adapter_that_is_active(
    heads: dict[str, Pack], tiny_bert: Path
) -> None:
    """Three heads in one model: the config has the labels and the problem of the active one, and its own
    again without any.
    """
    model = load_model(get_task(TEXT), tiny_bert).eval()
    own = dict(model.config.id2label)
    for pack in heads.values():
        attach(model, pack)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    classify = pipeline(TEXT, model=model, tokenizer=tokenizer, top_k=None)
    text = texts(2, 8)[5][0]
    sums = {}
    for problem, pack in heads.items():
        adapterpack.active(model, pack.name)
        scores = {one["label"]: one["score"] for one in classify(text)[0]}
        assert set(scores) == set(pack.manifest.task.labels)
        sums[problem] = sum(scores.values())
    assert sums["single_label_classification"] == pytest.approx(1.0)
    assert sums["multi_label_classification"] > 1.5 and abs(sums["regression"] - 0.25) < 0.5
    adapterpack.active(model, None)
    assert (model.config.id2label, model.config.problem_type, model.num_labels) == (own, None, 2)
    adapterpack.active(model, heads["multi_label_classification"].name)
    detach(model)
    assert (model.config.id2label, model.config.problem_type, model.num_labels) == (own, None, 2)


@pytest.mark.long
def test_bundles_and_merged_models_read_each_head_as_pipelines_do(
    heads: dict[str, Pack], tiny_bert: Path, tmp_path: Path
) -> None:
    """One graph with three heads of three problems, rows in turn: the scores are those of transformers'
    pipeline with the pack attached, and of the checkpoint into which the pack was merged.
    """
    export(
        tiny_bert, [str(pack.path) for pack in heads.values()], tmp_path / "bundle", mode="bank", task=TEXT
    )
    rows = [{"text": text, "adapter": pack.name} for text, _ in texts(2, 8) for pack in heads.values()]
    found = list(run(tmp_path / "bundle", rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    for problem, pack in heads.items():
        merge(tiny_bert, [pack], tmp_path / f"merged-{problem}")
        models = {
            "attached": attach(load_model(get_task(TEXT), tiny_bert).eval(), pack),
            "merged": AutoModelForSequenceClassification.from_pretrained(
                tmp_path / f"merged-{problem}"
            ).eval(),
        }
        for where, model in models.items():
            classify = pipeline(TEXT, model=model, tokenizer=tokenizer, top_k=None)
            for row in (row for row in found if row["adapter"] == pack.name):
                expected = {one["label"]: one["score"] for one in classify(rows[found.index(row)]["text"])[0]}
                assert row["scores"].keys() == expected.keys(), where
                np.testing.assert_allclose(
                    [row["scores"][label] for label in expected],
                    list(expected.values()),
                    atol=2e-5,
                    err_msg=where,
                )
                if problem == "multi_label_classification":
                    assert row["labels"] == [label for label, score in row["scores"].items() if score >= 0.5]


def test_heads_of_different_problems_are_not_added(heads: dict[str, Pack], tmp_path: Path) -> None:
    """A sum of such heads would mean nothing; one of them can be kept, with its problem."""
    packs = [heads["multi_label_classification"], heads["regression"]]
    for whole in ("average", "union"):
        with pytest.raises(Unsupported, match=r"labels|different problems"):
            compose(packs, out=tmp_path / "sum", rule="linear", whole=whole)
    kept = compose(packs, out=tmp_path / "sum", rule="linear", whole=f"pick:{packs[1].name}", rank=8)
    assert (kept.manifest.problem, kept.manifest.task.labels) == ("regression", ("score",))


@pytest.mark.fast
def test_what_labels_say_and_what_is_refused() -> None:
    """The problem is told by the labels, or named; targets are what transformers' losses take; labels of no
    problem are named.
    """
    assert labels_in([10, 2, 1], "here").names == ("1", "2", "10")
    assert labels_in([1.0, 5.0], "here").problem.name == "single_label_classification"
    ratings = labels_in([1, 5, 3], "here", "regression")
    assert (ratings.names, ratings.target(5, "here")) == (("score",), 5.0)
    tags = labels_in([["b"], [], ["a", "c"]], "here")
    assert (tags.names, tags.target(["c", "a"], "here"), tags.target([], "here")) == (
        ("a", "b", "c"),
        (1.0, 0.0, 1.0),
        (0.0, 0.0, 0.0),
    )
    with pytest.raises(
        ConfigError, match=r"training data does not have.*row 7; expected a, b, c, found \['d'\]"
    ):
        tags.target(["d"], "row 7")
    for values, problem, words in [
        ([0.25, "x"], None, "one text or whole number.*row 1"),
        ([None], None, "without a label"),
        (["a", "a"], None, "at least two labels"),
        ([[], []], None, "a row with a label"),
        (["a", "b"], "multi_label_classification", "must be a list.*row 1"),
        ([1, True], "regression", "a regression learns numbers.*row 2"),
        ([float("nan")], "regression", "row 1"),
    ]:
        with pytest.raises(ConfigError, match=words):
            labels_in(values, "here", problem)
    targets = np.array([0, 1, -100, 1])
    assert PROBLEMS["single_label_classification"].metrics(np.eye(2)[[0, 1, 0, 0]], targets) == {
        "accuracy": pytest.approx(2 / 3),
        "macro_f1": pytest.approx(2 / 3),
    }


def test_words_are_labelled_from_tokens_and_tags(tiny_bert: Path, tmp_path: Path) -> None:
    """Token classification learns a label for the first token of each word; the pipeline of transformers and
    the bundle name them.
    """
    dice = random.Random(0)
    rows = []
    for _ in range(64):
        words = [
            f"w{dice.choice((dice.randrange(4), dice.randrange(40, 44), dice.randrange(70, 90)))}"
            for _ in range(6)
        ]
        kinds = {word: "A" if int(word[1:]) < 4 else "B" if int(word[1:]) < 50 else "O" for word in words}
        rows.append({"tokens": words, "ner_tags": [kinds[word] for word in words]})
    table = tmp_path / "r.tsv"  # which holds no lists: texts with spaces are split
    lines = ["tokens\tner_tags", *(f"{' '.join(row['tokens'])}\t{' '.join(row['ner_tags'])}" for row in rows)]
    table.write_text("\n".join(lines), "utf-8")
    (pack,) = train(
        {
            "model_name_or_path": str(tiny_bert),
            "task": "token-classification",
            "train_file": str(table),
            "eval_file": write(tmp_path / "e.jsonl", rows[:16]),
            "output_dir": str(tmp_path / "tags"),
            "learning_rate": 1e-2,
            "max_steps": 40,
            "r": 4,
        }
    )
    assert pack.manifest.task.labels == ("A", "B", "O")
    claims = {metric["name"]: metric["value"] for metric in pack.manifest.metrics}
    assert claims["accuracy"] > 0.95
    export(tiny_bert, [pack], tmp_path / "bundle", mode="folded")
    measures = evaluate(tmp_path / "bundle", data=str(tmp_path / "e.jsonl")).measures["tags"]
    assert [measures[name] for name in ("accuracy", "f1")] == pytest.approx(
        [claims["accuracy"], claims["f1"]]
    )
    model = attach(load_model(get_task("token-classification"), tiny_bert).eval(), pack)
    tag = pipeline("token-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(tiny_bert))
    assert [one["entity"] for one in tag("w1 w75 w41")] == ["A", "B"]  # of O pipelines say nothing
    text = "w1 w2 w75 w3"
    (found,) = adapterpack.run(tmp_path / "bundle", [{"text": text}])
    grouped = tag(text, aggregation_strategy="first")
    assert [(one["type"], one["start"], one["end"]) for one in found["entities"]] == [
        (one["entity_group"], one["start"], one["end"]) for one in grouped
    ]
    assert [one["text"] for one in found["entities"]] == ["w1 w2", "w3"]
    ids = AutoTokenizer.from_pretrained(tiny_bert)(text)["input_ids"]
    engine = adapterpack.Engine(tmp_path / "bundle")
    engine.add(ids)
    labels = [one["label"] for event in engine.step() for one in event.result["tokens"]]
    assert labels == [one["label"] for one in found["tokens"]]  # this tokenizer adds no special tokens
    assert adapterpack.bench(tmp_path / "bundle", rows=(2,), prompt=5, runs=1).lines[0].prompt_speed > 0
    with pytest.raises(ConfigError, match=r"words and as many labels.*row 1"):
        train(
            {
                "model_name_or_path": str(tiny_bert),
                "task": "token-classification",
                "output_dir": str(tmp_path / "no"),
                "train_file": write(tmp_path / "b.jsonl", [{"tokens": ["w1"], "tags": ["A", "B"]}]),
            }
        )


@pytest.mark.parametrize("mode", ["bank", pytest.param("folded", marks=pytest.mark.long)])
def test_a_pair_is_read_with_the_types_that_it_was_learned_with(mode: str, tmp_path: Path) -> None:
    """Which of two texts has the larger number: logits of the bundle are those of torch with the tokenizer's
    types, also beside a row of one text, and without the types they are others.
    """
    base, dice = typed_bert(tmp_path / "base", [f"n{number}" for number in range(10)]), random.Random(0)
    rows = [
        {"sentence1": f"n{one}", "sentence2": f"n{other}", "label": ("less", "more")[one > other]}
        for one, other in (dice.sample(range(10), 2) for _ in range(64))
    ]
    train(
        {
            "model_name_or_path": str(base),
            "task": TEXT,
            "train_file": write(tmp_path / "rows.jsonl", rows),
            "name": "pairs",
            "output_dir": str(tmp_path / "pairs"),
            "learning_rate": 1e-2,
            "max_steps": 20,
            "max_length": 16,
        }
    )
    export(base, [tmp_path / "pairs"], tmp_path / "bundle", mode=mode)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = attach(AutoModelForSequenceClassification.from_pretrained(base).eval(), load(tmp_path / "pairs"))
    asked = [{"text": "n1 n2", "text_pair": "n7"}, {"text": "n5"}, {"text": "n8", "text_pair": "n3 n4 n4"}]
    found = run(tmp_path / "bundle", [{**row, "adapter": "pairs"} for row in asked])
    for row, one in zip(asked, found, strict=True):
        given = tokenizer(*row.values(), return_tensors="pt")
        with torch.no_grad():
            typed, plain = (
                model(**inputs).logits[0].softmax(0)
                for inputs in (given, {**given, "token_type_ids": 0 * given["input_ids"]})
            )
        np.testing.assert_allclose(list(one["scores"].values()), typed.numpy(), atol=1e-5)
        assert ("text_pair" in row) == bool((typed - plain).abs().max() > 1e-3)
