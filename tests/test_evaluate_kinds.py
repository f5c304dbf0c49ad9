"""The measures of every kind of evaluation, on tiny models: the figures of the field's libraries on the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rouge_score import rouge_scorer
from seqeval import metrics as seqeval
from seqeval.metrics.sequence_labeling import get_entities
from test_evaluate import judged, write
from torchmetrics.functional.text import squad
from torchmetrics.retrieval import RetrievalMRR, RetrievalRecall

from adapterpack import Session, evaluate
from adapterpack.evaluating.evaluation import (
    EVALUATIONS,
    AnsweredRows,
    EvaluatedModel,
    EvaluationRow,
    RowReply,
)
from adapterpack.evaluating.kinds.detection import average_precision, matches
from adapterpack.evaluating.kinds.texts import rouge
from adapterpack.tasks.data.problems import IGNORED, ONE, Labels
from adapterpack.tasks.token_classification import entities

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def test_entities_are_those_of_seqeval() -> None:
    """Words of four letters, each one token, with any labels; and marks in any order, with those of IOBES, too."""
    dice = np.random.default_rng(0)
    right, given = ([dice.choice(TAGS, 5).tolist() for _ in range(20)] for _ in range(2))
    spans = [(5 * at, 5 * at + 4) for at in range(5)]
    rows = [EvaluationRow(at, at, (), "", " ".join(tags), spans) for at, tags in enumerate(right, 1)]
    replies = [
        RowReply(
            [{"tokens": [{"start": 5 * at, "end": 5 * at + 4, "label": tag} for at, tag in enumerate(tags)]}]
        )
        for tags in given
    ]
    model = EvaluatedModel(None, None, Labels(TAGS, ONE), 0)  # type: ignore[arg-type]
    found = EVALUATIONS["words"].judge(AnsweredRows(rows, replies, None, model))
    ours = {one.name: one.value(np.ones(20, int)) for one in found.measures}
    assert ours == {
        "f1": pytest.approx(seqeval.f1_score(right, given)),
        "precision": pytest.approx(seqeval.precision_score(right, given)),
        "recall": pytest.approx(seqeval.recall_score(right, given)),
        "accuracy": pytest.approx(seqeval.accuracy_score(right, given)),
    }
    for _ in range(200):
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


def test_texts_are_measured_as_by_rouge_score() -> None:
    pairs = [
        ("the cat sat on the mat", "The cat is on the mat."),
        ("a dog", ""),
        ("no", "completely different"),
        ("x1 y2 z3 z3", "z3 x1 y2 z3, x1"),
    ]
    names = ("rouge1", "rouge2", "rougeL")
    scorer = rouge_scorer.RougeScorer(names)
    for answer, right in pairs:
        theirs = scorer.score(right, answer)
        assert rouge(answer, right) == pytest.approx([theirs[name].fmeasure for name in names])


def test_answers_and_their_likelihood(bundle_of: Callable[..., Path], dense_of: Any, tmp_path: Path) -> None:
    """Perplexity is that of the model in float64 on the learned tokens; answers are those that generate gives."""
    rows = [{"prompt": f"w{at} w{at + 1}", "completion": f"w{at + 2} w{at + 3} w{at}"} for at in range(3, 9)]
    found = evaluate(bundle_of("llama", "bank"), data=write(tmp_path / "rows.jsonl", rows))
    assert list(found.measures) == ["base", "alpha", "beta"]
    for model, name in zip(found.models, (None, "alpha", "beta"), strict=True):
        losses, exact = [], []
        for row, answer in zip(found.rows, model.judgement.answers, strict=True):
            ids = torch.tensor([row.scored[0]["input_ids"]])
            labels = torch.tensor([row.scored[0]["labels"]])
            logits = dense_of("llama", name)(ids).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction="none"))
            exact.append(answer.strip() == row.expected)
            (one,) = Session(bundle_of("llama", "bank")).generate(
                [row.asked[0]["prompt"]], [name], max_new_tokens=len(answer.split()) or 1
            )
            assert answer.startswith(one.text)
        learned = torch.cat(losses)[torch.cat(losses) > 0]
        measures = found.measures[model.name]
        assert measures["perplexity"] == pytest.approx(learned.mean().exp().item(), rel=1e-4)
        assert measures["exact_match"] == np.mean(exact)


def test_the_better_answer_wins_where_it_is_likelier(bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"w{at}", "chosen": f"w{at + 1} w2", "rejected": f"w{at + 5}"} for at in range(3, 15)]
    bundle = bundle_of("llama", "bank")
    found = evaluate(bundle, data=write(tmp_path / "rows.jsonl", rows), adapters=["alpha"])
    losses = {}
    for side in ("chosen", "rejected"):
        answers = [{"prompt": row["prompt"], "completion": row[side]} for row in rows]
        sided = evaluate(bundle, data=write(tmp_path / f"{side}.jsonl", answers), adapters=["alpha"])
        for model in sided.models:
            tokens = [sum(label != IGNORED for label in row.scored[0]["labels"]) for row in sided.rows]
            losses[model.name, side] = model.judgement.rows["loss"] * tokens
    margins = {name: losses[name, "rejected"] - losses[name, "chosen"] for name in ("base", "alpha")}
    for name, margin in margins.items():
        assert found.measures[name]["win_rate"] == np.mean(margin > 0)
        assert found.measures[name]["margin"] == pytest.approx(margin.mean(), rel=1e-5)
    rewards = margins["alpha"] - margins["base"]
    assert found.measures["alpha"]["reward_accuracy"] == np.mean(rewards > 0)
    assert "reward_accuracy" not in found.measures["base"]


def test_speech_is_measured_as_by_jiwer() -> None:
    answers = ["the cat sat", "", "on on the mat", "x"]
    right = ["the cat sat down", "hello there", "on the mat", "x"]
    for kind, key in (("speech", "completion"), ("speech-frames", "text")):
        _, ours = judged(kind, right, [{key: answer} for answer in answers])
        assert ours == {
            "wer": pytest.approx(jiwer.wer(right, answers)),
            "cer": pytest.approx(jiwer.cer(right, answers)),
        }


def test_objects_are_measured_as_by_coco(capfd: pytest.CaptureFixture[str]) -> None:
    dice = np.random.default_rng(0)
    images, right, found = [], [], []
    for image in range(12):
        boxes, labels = dice.uniform(1, 40, (int(dice.integers(0, 5)), 4)), dice.integers(0, 3, 4)
        names = [f"n{label}" for label, _ in zip(labels, boxes, strict=False)]
        guesses = np.concatenate([boxes + dice.normal(0, 2, boxes.shape), dice.uniform(1, 40, (2, 4))]).clip(
            0.5
        )
        guessed = [*names, *(f"n{label}" for label in dice.integers(0, 4, 2))]
        scores = dice.random(len(guesses)).tolist()
        right += [
            {
                "image_id": image,
                "category_id": int(name[1:]),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for name, box in zip(names, boxes.tolist(), strict=True)
        ]
        found += [
            {"image_id": image, "category_id": int(name[1:]), "bbox": box, "score": score}
            for name, box, score in zip(guessed, guesses.tolist(), scores, strict=True)
        ]
        objects = [
            {"label": name, "score": score, "box": dict(zip("abcd", (x, y, x + wide, y + tall), strict=True))}
            for name, score, (x, y, wide, tall) in zip(guessed, scores, guesses.tolist(), strict=True)
        ]
        images.append(matches((names, boxes.tolist()), objects))
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(12)],
        "categories": [{"id": label} for label in range(4)],
        "annotations": [{**one, "id": at} for at, one in enumerate(right, 1)],
    }
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(found), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert average_precision(images, slice(None), range(12)) == pytest.approx(judge.stats[0])
    assert average_precision(images, slice(1), range(12)) == pytest.approx(judge.stats[1])


def test_the_nearest_embeddings_belong_together() -> None:
    """Recall and MRR as torchmetrics retrieves, of distinct texts; an anchor's other positives do not compete."""
    dice = np.random.default_rng(0)
    vectors = dice.normal(size=(30, 2, 8))
    vectors[:, 1] += vectors[:, 0]
    asked = [({"text": f"a{at}"}, {"text": f"b{at}"}) for at in range(30)]
    replies = [RowReply([{"embedding": one} for one in pair]) for pair in vectors]
    rows = [EvaluationRow(at, at, pair, "", "") for at, pair in enumerate(asked, 1)]
    judge, model = EVALUATIONS["embeddings"].judge, EvaluatedModel(None, None, None, 0)  # type: ignore[arg-type]
    found = judge(AnsweredRows(rows, replies, None, model))
    units = torch.tensor(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
    scores = (units[:, 0] @ units[:, 1].T).flatten()
    given = scores, torch.eye(30, dtype=torch.bool).flatten(), torch.arange(30).repeat_interleave(30)
    ones, ours = np.ones(30, int), {}
    for one in found.measures:
        ours[one.name] = one.value(ones)
    for most in (1, 5, 10):
        assert ours[f"recall@{most}"] == pytest.approx(float(RetrievalRecall(top_k=most)(*given)))
    assert ours["mrr"] == pytest.approx(float(RetrievalMRR()(*given)))
    twice = [rows[0], rows[1]._replace(asked=(asked[0][0], asked[1][1]))]
    same = [replies[0], RowReply([replies[0].results[0], replies[1].results[1]])]
    again = judge(AnsweredRows(twice, same, None, model))
    assert again.rows["rank"].tolist() == [1, 1]
