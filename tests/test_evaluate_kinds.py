"""The measures of every kind of evaluation, on tiny models: the figures of the field's libraries on the same answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from seqeval import metrics as seqeval
from seqeval.metrics.sequence_labeling import get_entities
from test_evaluate import judged, write
from torchmetrics.functional.text import squad
from typed_bert import typed_bert

from adapterpack import LoRA, adapt, evaluate, export, save
from adapterpack.evaluating.kinds.words import entities
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

WORDS = ["what", "colour", "is", "the", "and", "lamp", "fan", "red", "blue", "ann", "bo", "oslo"]
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two types of tokens."""
    return typed_bert(tmp_path_factory.mktemp("evaluate") / "bert", WORDS)


@pytest.fixture(scope="module")
def bundle(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Task -> a bundle of the base with a random adapter ``own``."""

    def make(task: str, labels: Sequence[str] | None = None) -> Path:
        import torch

        folder = tmp_path_factory.mktemp(task)
        model = load_model(get_task(task), base, labels)
        adapt(model, LoRA(r=2, targets=("query",)), "own")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        pack = save(model, folder / "own", base=base)
        export(base, [pack], folder / "bundle", mode="inputs", task=task)
        return folder / "bundle"

    return make


def test_entities_are_those_of_seqeval(bundle: Callable[..., Path], tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    rows = [
        {"tokens": dice.choice(WORDS, size).tolist(), "ner_tags": dice.choice(TAGS, size).tolist()}
        for size in dice.integers(1, 7, 20)
    ]
    found = evaluate(bundle("token-classification", TAGS), data=write(tmp_path / "rows.jsonl", rows))
    right = [row["ner_tags"] for row in rows]
    answers = [answer.split() for answer in found.models[0].judgement.answers]
    assert found.measures["own"] == {
        "f1": pytest.approx(seqeval.f1_score(right, answers)),
        "precision": pytest.approx(seqeval.precision_score(right, answers)),
        "recall": pytest.approx(seqeval.recall_score(right, answers)),
        "accuracy": pytest.approx(seqeval.accuracy_score(right, answers)),
    }
    for _ in range(200):  # marks in any order, with those of IOBES too
        tags = [f"{dice.choice([*'BIES'])}-{dice.choice(['PER', 'LOC'])}" for _ in range(8)]
        tags[dice.integers(8)] = "O"
        assert entities(tags) == {(kind, int(start), int(end)) for kind, start, end in get_entities(tags)}


def test_spans_are_measured_as_squad_does() -> None:
    given = ["red", "", "the lamp is", "The Red lamp!", "a", ""]
    wanted = [["blue", "is red"], [""], ["the lamp"], ["red lamps", "lamp."], ["an"], ["fan"]]
    theirs = squad(
        [{"prediction_text": text, "id": str(at)} for at, text in enumerate(given)],
        [
            {"answers": {"text": some, "answer_start": [0] * len(some)}, "id": str(at)}
            for at, some in enumerate(wanted)
        ],
    )
    _, ours = judged("spans", wanted, [{"answer": text} for text in given])
    assert 100 * ours["f1"] == pytest.approx(float(theirs["f1"]))
    assert 100 * ours["exact_match"] == pytest.approx(float(theirs["exact_match"]))
