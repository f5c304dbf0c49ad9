"""Quantized forms compared on rows: the figures are those of the formulas, on bundles that quantize itself
writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from notebooks import page_in_notebook
from shipped_schemas import fits

from adapterpack import Session, compare_quantized, merge, quantize
from adapterpack.cli.main import main
from adapterpack.errors import ConfigError, NothingToDo, UnknownAdapter, UnknownName

Make = Callable[..., Any]
WORDS = ["where", "is", "my", "parcel", "and", "when", "will", "the", "order", "come"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng = tmp_path_factory.mktemp("rows") / "rows.jsonl", np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 9)) for _ in range(9)]
    lines: list[Any] = [{"text": text} for text in texts[:3]] + [
        {"prompt": text, "completion": " ".join(WORDS[:3])} for text in texts[3:6]
    ]
    lines += [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": WORDS[4]}]}
        for text in texts[6:]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def perplexity(folder: Path, adapter: str | None, rows: Path) -> float:
    """By its definition, in float64, of what each row has to be learnt of it."""
    session = Session(folder, "cpu")
    losses = []
    for row in map(json.loads, rows.read_text().splitlines()):
        prompt = row.get("prompt", row["messages"][0]["content"] if "messages" in row else None)
        answer = row.get("completion", row["messages"][1]["content"] if "messages" in row else None)
        given = [] if prompt is None else session.tokenizer.prompt(prompt)
        ids = (
            session.tokenizer.row(row["text"])
            if prompt is None
            else given + session.tokenizer.encode(answer, special=False)
        )
        logits = session.run({"input_ids": np.array([ids])}, adapter)["logits"][0].astype(np.float64)
        for place in range(max(len(given), 1), len(ids)):
            losses.append(np.logaddexp.reduce(logits[place - 1]) - logits[place - 1, ids[place]])
    return float(np.exp(np.mean(losses)))


@pytest.mark.long
def test_the_figures_are_those_of_each_form(
    bundle_of: Make, pack_of: Make, rows: Path, tmp_path: Path
) -> None:
    """Perplexity in float64 within float noise (1e-6) of bundles that are made one by one; JSON, a table and
    a page say the same.
    """
    bundle, page = bundle_of("llama", "bank"), tmp_path / "compare.html"
    done = CliRunner().invoke(
        main,
        [
            "quantize",
            str(bundle),
            "--compare",
            str(rows),
            "--adapter",
            "alpha",
            "--scheme",
            "int2",
            "--head",
            "float",
            "--compensate",
            "5",
            "--html",
            str(page),
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert fits(result, "report.v1")
    merge(bundle, [pack_of("llama", "alpha")], tmp_path / "merged")
    made = {
        "attached": quantize(bundle, tmp_path / "attached", scheme="int2", head="float"),
        "compensated": quantize(bundle, tmp_path / "compensated", scheme="int2", head="float", compensate=5),
    }
    quantize(tmp_path / "merged", tmp_path / "merged4", scheme="int2", head="float")
    assert {"float", "merged", *made} == {form["way"] for form in result["forms"]}
    for form in result["forms"]:
        folder = {"float": bundle, "merged": tmp_path / "merged4"}.get(form["way"], tmp_path / form["way"])
        adapter = None if form["way"] == "merged" else "alpha"
        assert form["perplexity"] == pytest.approx(perplexity(folder, adapter, rows), rel=1e-6)
        assert form["bytes"] == sum(file.stat().st_size for file in folder.glob("*.onnx*"))
        assert (
            form["decode"] > 0 and form["prefill"] > 0 and 0 <= form["right"] <= 1 and form["reason"] is None
        )
    assert result["forms"][0]["agreement"] == 1 > min(form["agreement"] for form in result["forms"])
    assert any("rank 5" in sentence for sentence in result["advice"])
    assert (
        all(sentence.split(" (")[0] in page.read_text() for sentence in result["advice"])
        and "<table" in page.read_text()
    )


def test_labels_of_a_classifier(bundle_of: Make, tmp_path: Path) -> None:
    """Right answers are counted by the labels that the bundle gives, perplexity is that of the right labels
    by its formula; a way that cannot be gone is named with its reason.
    """
    bundle, file = bundle_of("bert", "bank"), tmp_path / "rows.jsonl"
    session = Session(bundle, "cpu")
    labels, texts = (
        session.head(session.pack("alpha")).labels,
        [f"{one} {two}" for one in WORDS for two in WORDS[:4]],
    )
    assert labels is not None
    best = [
        labels[int(session.run(session.encode([text]), "alpha")["logits"][0, : len(labels)].argmax())]
        for text in texts
    ]
    wrong = [
        label if number % 4 else next(one for one in labels if one != label)
        for number, label in enumerate(best)
    ]
    file.write_text(
        "".join(
            json.dumps({"text": text, "label": label}) + "\n"
            for text, label in zip(texts, wrong, strict=True)
        )
    )
    found = compare_quantized(bundle, file, adapter="alpha", schemes=["int8"])
    assert "int8" in page_in_notebook(found)
    first, *others = found.forms
    assert first.figures is not None and first.figures.right == 0.75
    losses = [
        np.logaddexp.reduce(found) - found[labels.index(label)]
        for text, label in zip(texts, wrong, strict=True)
        for found in [
            session.run(session.encode([text]), "alpha")["logits"][0, : len(labels)].astype(np.float64)
        ]
    ]
    # scores are of float32
    assert first.figures.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert [form.way for form in others] == ["merged", "attached", "compensated"]
    assert all((form.figures is None) == bool(form.reason) for form in others)


def test_what_cannot_be_compared(bundle_of: Make, rows: Path, tmp_path: Path) -> None:
    """One sentence each, before anything is made."""
    bundle, bad = bundle_of("llama", "bank"), tmp_path / "bad.jsonl"
    bad.write_text('{"text": "my parcel"}\n{"txt": "is"}\n')
    table = tmp_path / "tickets.csv"
    table.write_text("text,label\nmy parcel,delivery\n")
    cases: list[tuple[type[Exception], str, Path, dict[str, Any]]] = [
        (ConfigError, "bad.jsonl, line 2", bad, {}),
        (ConfigError, "give a JSONL file", table, {}),
        (UnknownAdapter, "alpha", rows, {"adapter": "alhpa"}),
        (ConfigError, "several adapters", rows, {"adapter": None}),
        (UnknownName, "int4", rows, {"schemes": ["imt4"]}),
        (ConfigError, "block-size", rows, {"schemes": ["fp16"], "block_size": 16}),
    ]
    said: list[str] = []
    for error, words, file, options in cases:
        with pytest.raises(error, match=words):
            compare_quantized(bundle, file, progress=said.append, **{"adapter": "alpha", **options})
    assert not said
    quantize(bundle, tmp_path / "out", scheme="int4")
    with pytest.raises(NothingToDo):
        compare_quantized(tmp_path / "out", rows, adapter="alpha")
