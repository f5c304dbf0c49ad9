"""Question answering, the whole line: rows like SQuAD's, a head and an adapter, graphs in three modes, and
spans of contexts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from typed_bert import typed_bert

from adapterpack import Session, attach, evaluate, export, load, run, train, validate
from adapterpack.bundle.manifest import read_bundle
from adapterpack.cli.main import main
from adapterpack.errors import ConfigError
from adapterpack.tasks import question_answering
from adapterpack.tasks.question_answering import LONGEST, best_span
from adapterpack.tasks.task import get_task, task_of
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.training.data import load as data

Make = Callable[..., Any]
THINGS = ["lamp", "kettle", "radio", "fan", "clock", "drill"]
VALUES = ["red", "blue", "green", "white", "black", "grey"]
WORDS = ["what", "colour", "is", "the", "and", *THINGS, *VALUES]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two types of tokens, and a tokenizer that makes pairs as BERT's does."""
    return typed_bert(tmp_path_factory.mktemp("qa") / "bert", WORDS)


def rows_of(count: int, seed: int) -> list[dict[str, Any]]:
    """``what colour is the lamp`` of ``the fan is red and the lamp is blue``; of every eighth question the
    context knows nothing.
    """
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        things, values = rng.permutation(THINGS)[:3], rng.permutation(VALUES)[:2]
        context = " and ".join(
            f"the {thing} is {value}" for thing, value in zip(things, values, strict=False)
        )
        asked = things[2] if number % 8 == 7 else things[number % 2]
        answer = None if number % 8 == 7 else values[number % 2]
        rows.append(
            {
                "question": f"what colour is the {asked}",
                "context": context,
                "answers": {"text": [], "answer_start": []}
                if answer is None
                else {"text": [str(answer)], "answer_start": [context.index(str(answer))]},
            }
        )
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def packs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One that learnt it, and one that learnt for a moment."""
    folder = tmp_path_factory.mktemp("qa-packs")
    rows = written(folder / "rows.jsonl", rows_of(800, 0))
    known = written(folder / "known.jsonl", rows_of(64, 1))
    config = {
        "model_name_or_path": str(base),
        "task": "question-answering",
        "train_file": str(rows),
        "method": "lora",
        "r": 16,
        "alpha": 32,
        "target_modules": "all-linear",
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
    }
    train({**config, "output_dir": str(folder / "knows"), "num_train_epochs": 30, "eval_file": str(known)})
    train({**config, "output_dir": str(folder / "guesses"), "max_steps": 2, "r": 2})
    return folder / "knows", folder / "guesses"


@pytest.fixture(scope="module")
def bundles(
    base: Path, packs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(mode: str) -> Path:
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("qa-bundles") / mode
            export(base, packs[:1] if mode == "folded" else packs, made[mode], mode=mode)
        return made[mode]

    return get


def asked_of_torch(
    model: torch.nn.Module, tokenizer: Any, question: str, context: str
) -> tuple[str, int, int, float]:
    """The likeliest span by trying every one, in float64; transformers itself has no pipeline of this task
    any more.
    """
    given = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    places, kinds = given.pop("offset_mapping")[0].tolist(), given.sequence_ids()
    with torch.no_grad():
        out = model(**given)
    allowed = torch.tensor([place == 0 or kind == 1 for place, kind in enumerate(kinds)])
    starts, ends = (
        side[0].double().masked_fill(~allowed, -torch.inf).softmax(-1)
        for side in (out.start_logits, out.end_logits)
    )
    inside = [place for place, kind in enumerate(kinds) if kind == 1]
    spans = {(i, j): float(starts[i] * ends[j]) for i in inside for j in inside if i <= j} | {
        (0, 0): float(starts[0] * ends[0])
    }
    first, last = max(spans, key=lambda span: spans[span])
    start, end = (places[first][0], places[last][1]) if first else (0, 0)
    return context[start:end], start, end, spans[first, last]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["bank", "inputs", "folded"])
def test_answers_are_those_of_transformers(
    mode: str, base: Path, packs: tuple[Path, Path], bundles: Make
) -> None:
    """Rows of a batch with other adapters beside them, against the logits of the same model in torch, one row
    at a time.
    """
    bundle = read_bundle(bundles(mode))
    assert bundle.task == "question-answering"
    assert {port.name for port in bundle.io.inputs} >= {"input_ids", "attention_mask", "token_type_ids"}
    assert max(bundle.parity["max_relative"].values()) < 1e-4
    assert (
        list(bundle.parity["canary"]["replayed"]) == ["knows"] if mode == "folded" else ["knows", "guesses"]
    )
    model = load_model(get_task("question-answering"), base).eval()
    attach(model, load(packs[0]))
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [row for number, row in enumerate(rows_of(24, 2)) if number % 8 != 7]
    asked = [{"question": row["question"], "context": row["context"], "adapter": "knows"} for row in rows]
    if mode != "folded":
        asked[1::3] = [{**row, "adapter": "guesses"} for row in asked[1::3]]
    for row, found in zip(rows, run(bundles(mode), asked), strict=True):
        if found["adapter"] == "knows":
            answer, start, end, score = asked_of_torch(model, tokenizer, row["question"], row["context"])
            assert (found["answer"], found["start"], found["end"]) == (answer, start, end)
            assert abs(found["score"] - score) < 1e-4


@pytest.mark.long
def test_it_was_learnt(packs: tuple[Path, Path], bundles: Make, tmp_path: Path) -> None:
    """Rows that were not trained on, and questions without an answer."""
    rows = rows_of(64, 3)
    found = list(
        run(
            bundles("bank"),
            [{"question": row["question"], "context": row["context"]} for row in rows],
            adapters=["knows"],
        )
    )
    right = [
        one["answer"] == next(iter(row["answers"]["text"]), "") for one, row in zip(found, rows, strict=True)
    ]
    assert np.mean(right) > 0.9
    measured = evaluate(bundles("bank"), data=str(written(tmp_path / "rows.jsonl", rows)), adapters=["knows"])
    assert measured.measures["knows"]["exact_match"] == np.mean(right)
    metrics = {metric["name"]: metric["value"] for metric in load(packs[0]).manifest.metrics}
    assert metrics["accuracy"] > 0.9


@pytest.mark.long
def test_the_base_has_no_head(bundles: Make) -> None:
    row = {"question": "what colour is the lamp", "context": "the lamp is red", "adapter": None}
    (found,) = run(bundles("bank"), [row])
    assert found["answer"] is None
    assert "no trained head" in found["note"]
    with pytest.raises(ConfigError, match="needs question and context"):
        list(run(bundles("bank"), [{"question": "what"}]))


@pytest.mark.long
def test_the_types_of_tokens_count(bundles: Make) -> None:
    """A row is read with the types that its tokenizer gives; without them it is another row."""
    session = Session(bundles("bank"), "cpu")
    ids, types, _ = session.tokenizer.pair("what colour is the lamp", "the lamp is red")
    assert sum(types) == 5
    batch = {"input_ids": np.array([ids])}
    plain = session.run(batch, "knows")["start_logits"]
    typed = session.run({**batch, "token_type_ids": np.array([types])}, "knows")["start_logits"]
    assert np.abs(plain - typed).max() > 1e-3


@pytest.mark.long
def test_the_command_line_answers(bundles: Make) -> None:
    assert not validate(bundles("bank"), full=True).findings
    told = [
        "run",
        str(bundles("bank")),
        "--adapter",
        "knows",
        "--prompt",
        "what colour is the lamp",
        "--context",
        "the lamp is red and the fan is blue",
    ]
    result = CliRunner().invoke(main, told)
    assert result.exit_code == 0, result.output
    assert result.output.strip() == "knows | what colour is the lamp | red"


@pytest.mark.long
def test_a_pack_says_what_it_is_to_peft(packs: tuple[Path, Path], base: Path) -> None:
    """PEFT loads it onto the model of the task, head included, with the same logits.

    Asked below its outermost class, whose ``forward`` of this task takes ``token_type_ids`` and does not hand
    them on.
    """
    from peft import PeftModel

    told = json.loads((packs[0] / "adapter_config.json").read_text("utf-8"))
    assert told["task_type"] == "QUESTION_ANS"
    tokenizer = AutoTokenizer.from_pretrained(base)
    given = tokenizer("what colour is the lamp", "the lamp is red and the fan is blue", return_tensors="pt")
    theirs = PeftModel.from_pretrained(AutoModelForQuestionAnswering.from_pretrained(base), packs[0]).eval()
    ours = attach(load_model(get_task("question-answering"), base).eval(), load(packs[0]))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.base_model(**given).start_logits, ours(**given).start_logits, rtol=0, atol=1e-5
        )


def test_rows_of_another_form_are_refused(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)

    def encoded(rows: list[dict[str, Any]], length: int = 64) -> list[dict[str, Any]]:
        return question_answering.encode(
            data.load_rows(str(written(tmp_path / "rows.jsonl", rows))), tokenizer, length, "rows"
        )

    good = rows_of(2, 0)
    found = encoded(good)
    for row, one in zip(good, found, strict=True):
        text = tokenizer.decode(one["input_ids"][one["start_positions"] : one["end_positions"] + 1])
        assert text == row["answers"]["text"][0]
    flat = [
        {
            "question": row["question"],
            "context": row["context"],
            "answer": row["answers"]["text"][0],
            "answer_start": row["answers"]["answer_start"][0],
        }
        for row in good
    ]
    assert encoded(flat) == found  # as CSV files have them
    (once,) = encoded([{"question": "what", "context": "the lamp is red", "answer": "red"}])
    assert tokenizer.decode(once["input_ids"][once["start_positions"] : once["end_positions"] + 1]) == "red"
    for context, words in (("red is red", "2 times in its context"), ("the lamp", "is not in its context")):
        with pytest.raises(ConfigError, match=words):
            encoded([{"question": "what", "context": context, "answer": "red"}])
    with pytest.raises(ConfigError, match="is not at 3 of its context"):
        encoded([{**good[0], "answers": {"text": ["red"], "answer_start": [3]}}])
    with pytest.raises(ConfigError, match="needs the columns"):
        encoded([{"question": "what", "answers": {"text": ["red"], "answer_start": [3]}}])
    with pytest.raises(ConfigError, match="beyond max_length"):
        encoded(
            [
                {
                    "question": "what",
                    "context": "the lamp and the fan is red",
                    "answers": {"text": ["red"], "answer_start": [24]},
                }
            ],
            6,
        )


@pytest.mark.fast
def test_the_best_span() -> None:
    """It lies inside, begins before it ends, is not too long; and no answer wins where its token has the
    larger chance.
    """
    rng = np.random.default_rng(0)
    for _ in range(50):
        starts, ends = rng.standard_normal((2, 40)) * 3
        inside = [5 <= place < 38 for place in range(40)]
        start, end, score = best_span(starts, ends, inside)
        every = {
            (i, j): starts[i] + ends[j] for i in range(5, 38) for j in range(i, min(38, i + LONGEST))
        } | {(0, 0): starts[0] + ends[0]}
        assert (start, end) == max(every, key=lambda span: every[span])
        assert 0 < score < 1


@pytest.mark.fast
def test_the_task_is_told_by_the_class() -> None:
    assert task_of("RobertaForQuestionAnswering").name == "question-answering"
