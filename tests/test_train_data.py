"""Where rows come from, what becomes of them, and how they are packed."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from adapterpack import LoRA, adapt, train
from adapterpack.errors import AdapterpackError, ConfigError, FormatError, StorageError, Unsupported
from adapterpack.tasks import text_classification
from adapterpack.tasks.data.problems import ONE, Labels
from adapterpack.tasks.data.report import DataReport, RowReading
from adapterpack.tasks.preferences.form import labelled_answers, pairs_of_answers
from adapterpack.tasks.task import get_task
from adapterpack.training.config.config import read_config
from adapterpack.training.config.sources import Source, sources_of
from adapterpack.training.data import decompress as readable_files
from adapterpack.training.data import limits as data_files
from adapterpack.training.data import load as data
from adapterpack.training.data import pack_sequences as packing
from adapterpack.training.data.encode import read, tables


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ROWS = [{"text": f"w{number} w{number + 1}", "label": "no" if number % 2 else "yes"} for number in range(12)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The data sets' cache in a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield folder


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict[str, Any]], path: Path, sep: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=sep)
        writer.writeheader()
        writer.writerows(rows)


def config(base: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(base),
        "output_dir": str(folder / "pack"),
        "max_length": 32,
        "max_steps": 2,
        "r": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        **more,
    }


def rows_of(base: Path, **settings: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    (one,), _ = read_config({"model_name_or_path": str(base), "output_dir": "out", **settings})
    task = get_task(one.task)
    assert task.training is not None
    found = read(one, task, task.training, AutoTokenizer.from_pretrained(base))
    return found[0], found[1]


def test_a_workbook_is_its_first_sheet(tmp_path: Path) -> None:
    """Numbers stay numbers, a column with a text is text, and what is no workbook is refused in words."""
    book = openpyxl.Workbook()
    for row in (
        ["text", "label", "share", "note"],
        ["schön", 1, 0.5, "a"],
        ["b", 2, 3, 7],
        ["c", None, 2, None],
    ):
        book.active.append(row)
    book.create_sheet("another").append(["nothing"])
    book.save(tmp_path / "rows.xlsx")
    assert data.load_rows(str(tmp_path / "rows.xlsx"))[:] == {
        "text": ["schön", "b", "c"],
        "label": [1, 2, None],
        "share": [0.5, 3.0, 2.0],
        "note": ["a", "7", None],
    }
    openpyxl.Workbook().save(tmp_path / "empty.xlsx")
    (tmp_path / "broken.xlsx").write_bytes(b"PK\x03\x04 and no more")
    for name, words in (("empty", "the data file is empty"), ("broken", "the workbook cannot be read.*CSV")):
        with pytest.raises(ConfigError, match=words):
            data.load_rows(str(tmp_path / f"{name}.xlsx"))


def test_rows_are_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    """Plain and packed, one file, several by a pattern, a folder, a split of a file, columns by other names;
    a folder of pictures has the names of its folders for labels.
    """
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    table(ROWS, tmp_path / "a.csv", ",")
    table(ROWS, tmp_path / "a.tsv", "\t")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    for kind in ("jsonl", "csv"):
        (tmp_path / f"a.{kind}.gz").write_bytes(gzip.compress((tmp_path / f"a.{kind}").read_bytes()))
    for kind in ("json", "jsonl", "csv", "tsv", "parquet", "jsonl.gz", "csv.gz"):
        assert data.load_rows(str(tmp_path / f"a.{kind}")).to_list() == ROWS, kind
    # csv, csv.gz, json, jsonl, jsonl.gz
    assert data.load_rows(str(tmp_path / "a.[cj]s*")).to_list() == ROWS * 5
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(lines(ROWS[:5]))
    (tmp_path / "folder" / "test.jsonl").write_text(lines(ROWS[5:]))
    assert data.load_rows(str(tmp_path / "folder")).to_list() == ROWS[:5]
    assert data.load_rows(Source(str(tmp_path / "folder"), split="test")).to_list() == ROWS[5:]
    renamed = data.load_rows(Source(str(tmp_path / "a.csv"), split="train[:3]", columns={"review": "text"}))
    assert renamed.to_list() == [{"review": row["text"], "label": row["label"]} for row in ROWS[:3]]
    (tmp_path / "a.txt").write_text("w1 w2\n\nw3\n")
    assert list(data.load_rows(str(tmp_path / "a.txt"))["text"]) == ["w1 w2", "", "w3"]
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / label / "one.png")
    pictures = data.load_rows(str(tmp_path / "pictures"))
    assert sorted(pictures["label"]) == ["cat", "dog"]
    assert Image.open(pictures[0]["image"]["path"]).size == (4, 4)


def test_media_start_from_the_current_folder_or_from_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that leads to a file from here is kept; others start from the folder of the data file; what is
    nowhere stays as it is, for the error that names it.
    """
    (tmp_path / "set").mkdir()
    for name in ("set/a.wav", "set/b.wav", "b.wav"):
        (tmp_path / name).write_bytes(b"RIFF")
    names = ["a.wav", "b.wav", "c.wav", "x" * 5000, "data:audio/wav;base64,AA=="]
    (tmp_path / "set" / "rows.jsonl").write_text(lines([{"audio": name} for name in names]))
    (tmp_path / "set" / "seen.jsonl").write_text(lines([{"images": names[:3]}]))
    monkeypatch.chdir(tmp_path)
    found = ["set/a.wav", "b.wav", *names[2:]]
    assert list(data.load_rows("set/rows.jsonl")["audio"]) == found
    assert list(data.load_rows("set/seen.jsonl")["images"]) == [found[:3]]


def test_a_folder_of_recordings_needs_no_decoder(tmp_path: Path) -> None:
    """torchcodec is not installed; part of a folder is a part of each class."""
    for label in ("no", "yes"):
        (tmp_path / label).mkdir()
        for number in range(4):
            (tmp_path / label / f"{number}.wav").write_bytes(b"RIFF")
    rows = data.load_rows(str(tmp_path))
    assert rows[5] == {"audio": {"bytes": None, "path": str(tmp_path / "yes" / "1.wav")}, "label": "yes"}
    some = data.load_rows(Source(str(tmp_path), max_samples=3))
    assert [Path(one["path"]).name for one in some["audio"]] == ["0.wav", "2.wav", "1.wav"]
    assert list(some["label"]) == ["no", "no", "yes"]
    assert list(data.load_rows(Source(str(tmp_path), share=0.25))["label"]) == ["no", "yes"]


def test_a_folder_of_data_names_no_file_elsewhere(tmp_path: Path) -> None:
    """Whoever made it may have written a card that names files of this machine, or a link to one: neither is
    read.
    """
    secret, folder = tmp_path / "secret.jsonl", tmp_path / "data"
    secret.write_text(lines([{"text": "secret", "label": "yes"}]))
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines(ROWS))
    for name in ("../secret.jsonl", str(secret), "http://127.0.0.1:9/rows.jsonl"):
        card = (
            f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {name}\n---\n"
        )
        (folder / "README.md").write_text(card)
        assert data.load_rows(str(folder)).to_list() == ROWS
        with pytest.raises(ConfigError, match="lies in it"):
            data.load_rows(Source(str(folder), data_files=name))
    assert data.load_rows(Source(str(folder), data_files="tr*.jsonl")).to_list() == ROWS
    with pytest.raises(ConfigError, match=r"its card is not read.*data_files"):
        data.load_rows(Source(str(folder), name="default"))
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(FormatError, match="a link leads out of the folder"):
        data.load_rows(str(folder))
    (folder / "more").unlink()
    (folder / "train-2.jsonl").symlink_to(secret)
    with pytest.raises(FormatError, match=r"a link leads out of the folder.*secret\.jsonl"):
        data.load_rows(str(folder))


def test_one_list_of_more_than_16_mib_without_a_text_is_looked_through(tmp_path: Path) -> None:
    """In pieces: it takes little more memory than one of them."""
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b",".join([b"[1,2,3,4,5,6,7]"] * 1_150_000) + b"]")
    assert path.stat().st_size > data_files.MAX_ROW
    tracemalloc.start()
    try:
        data_files.require_bounded(path)
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


@given(st.lists(st.text(alphabet='x\\\\"[{\\n', max_size=200), max_size=5), st.integers(0, 2000))
def test_pieces_of_a_list_part_no_text(texts: list[str], cut: int) -> None:
    """Whatever stands in the texts, and where the file ends: the marks outside of texts are those of the
    whole.
    """
    whole = json.dumps([{"a": text} for text in texts]).encode()[:cut]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_files, "_BLOCK", 32)
        pieces = [whole[start:stop] for start, stop in data_files._pieces(whole, "rows.json")]
    assert b"".join(pieces) == whole
    assert b"".join(data_files._STRINGS.sub(b"-", piece) for piece in pieces) == data_files._STRINGS.sub(
        b"-", whole
    )


def test_tables_of_spreadsheets(tmp_path: Path) -> None:
    """Semicolons and tabs are seen, beside files with commas; another encoding and an empty file are
    named.
    """
    table(ROWS[:5], tmp_path / "a.csv", ";")
    table(ROWS[5:], tmp_path / "b.csv", ",")
    (tmp_path / "c.csv").write_bytes(b"")
    assert data.load_rows(str(tmp_path / "?.csv")).to_list() == ROWS
    table(ROWS, tmp_path / "tabs.csv", "\t")
    assert data.load_rows(str(tmp_path / "tabs.csv")).to_list() == ROWS
    (tmp_path / "windows.csv").write_bytes("text;label\nschön;yes\n".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"windows\.csv.*not in UTF-8|not in UTF-8.*windows\.csv"):
        data.load_rows(str(tmp_path / "windows.csv"))
    for name in ("c.csv", "rows.jsonl"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ConfigError, match=f"the data file is empty.*{name}"):
            data.load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "more", "error", "words"),
    [
        ("a.jsonl", None, {}, StorageError, ["no such data file"]),
        ("b*.jsonl", None, {}, StorageError, ["no such data file", "b*.jsonl"]),
        ("a.docx", b"x", {}, ConfigError, ["names no kind", ".docx", ".jsonl"]),
        ("a.jsonl.gz", b"\x1f\x8bxx", {}, ConfigError, ["cannot be unpacked"]),
        (
            "a.jsonl.gz",
            gzip.compress(b" " * (1 << 20), mtime=0),
            {},
            ConfigError,
            ["far larger than it looks", "a.jsonl.gz"],
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "w1"}\n{"text" "w2"}\n', mtime=0),
            {},
            ConfigError,
            ["a.jsonl.gz, line 2"],
        ),
        ("a.jsonl", lines(ROWS).encode(), {"revision": "main"}, ConfigError, ["no such setting"]),
        (
            "a.jsonl",
            lines(ROWS).encode(),
            {"columns": {"review": "txt"}},
            ConfigError,
            ["no such column", "found txt", "did you mean 'text'?", "such as {text: "],
        ),
        (
            "a.jsonl",
            lines(ROWS).encode(),
            {"columns": {"text": "txt", "label": "team"}},
            ConfigError,
            ["columns: {txt: text, team: label}"],
        ),
    ],
)
def test_files_that_are_none(
    name: str,
    content: bytes | None,
    more: dict[str, Any],
    error: type[AdapterpackError],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is missing, damaged or of another kind is named."""
    monkeypatch.setattr(readable_files, "_LEAST", 1 << 16)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error) as caught:
        data.load_rows(Source(str(tmp_path / name), **more))
    for word in words:
        assert word in str(caught.value)


def test_rows_are_read_without_a_home(tmp_path: Path) -> None:
    """In a container whose user has no home there is no folder for what ``datasets`` makes of files."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "w1"}\n')
    code = "import sys; from adapterpack.training.data.load import load_rows; print(load_rows(sys.argv[1]).to_list())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, rows],
        env={**environment, "HOME": "/dev/null/home"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[{'text': 'w1'}]\n", done.stderr[-2000:]


def test_sources_of_several_forms(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each source has its own form, told by its columns or named; the table says what was read as what, and
    what became of it.
    """
    (tmp_path / "chats.jsonl").write_text(
        lines(
            [
                {
                    "messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}],
                    "id": 7,
                }
            ]
        )
    )
    table(
        [{"question": "w3", "answer": "w4"}, {"question": " ".join(["w5"] * 40), "answer": "w6"}],
        tmp_path / "pairs.csv",
        ",",
    )
    (tmp_path / "plain.txt").write_text("w7\n\n" + " ".join(["w8"] * 40) + "\n")
    with caplog.at_level(logging.INFO):
        train(
            {
                **config(tiny_llama, tmp_path),
                "datasets": [
                    str(tmp_path / "chats.jsonl"),
                    {
                        "path": str(tmp_path / "pairs.csv"),
                        "form": "alpaca",
                        "columns": {"instruction": "question", "output": "answer"},
                    },
                    {"path": str(tmp_path / "plain.txt"), "type": "completion"},
                ],
            }
        )
    said = [record.getMessage() for record in caplog.records if record.name.startswith("adapterpack")]
    assert not any("\n" in line for line in said)  # on a terminal a record is one line
    first = next(number for number, line in enumerate(said) if line.split()[:2] == ["data", "form"])
    shown = said[first : first + 4]
    cells = [line.replace(str(tmp_path) + "/", "").split() for line in shown]
    assert cells[1:] == [
        ["chats.jsonl", "messages", "1", "3", "0", "0", "0", "id"],
        ["pairs.csv", "alpaca", "1", "3", "0", "1", "0"],
        ["plain.txt", "text", "3", "43", "0", "1", "0"],
    ]
    with pytest.raises(ConfigError, match="not of the form messages"):
        rows_of(tiny_llama, train_file={"path": str(tmp_path / "pairs.csv"), "form": "messages"})
    with pytest.raises(ConfigError, match="no form to choose"):
        (tmp_path / "labels.jsonl").write_text(lines(ROWS))
        rows_of(
            tiny_llama,
            task="text-classification",
            train_file={"path": str(tmp_path / "labels.jsonl"), "form": "text"},
        )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "the data file is empty"),
        ({}, "the data file is empty"),
        ([{"messages": []}], "there are no messages"),
        ([{"messages": [[]]}], "a list of messages was expected"),
        ([{"messages": "w1"}], "a list of messages was expected"),
        ([{"messages": [{"content": "w1"}]}], "the last message is not"),
        ([{"prompt": [], "completion": []}], "there are no messages"),
        ([{"conversations": ["w1"]}], "a list of messages was expected"),
        ([{"instruction": ["w1"], "output": "w2"}], "text was expected"),
    ],
)
def test_json_that_holds_no_rows_is_refused_in_plain_words(
    rows: Any, said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Not in those of Python or of a library, which say nothing of the data."""
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=said):
        rows_of(tiny_llama, train_file=str(tmp_path / "rows.json"))


def test_bad_rows_end_the_run_or_are_left_out(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By row and by line where blank lines or skipped ones make these differ; what is left are the good
    rows.
    """
    good = [{"prompt": f"w{number}", "completion": "w9"} for number in range(4)]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n"
        + lines(good[:2])
        + "no json\n"
        + lines([{"prompt": "w1", "completion": None}])
        + "[1]\n"
        + lines(good[2:])
    )
    with pytest.raises(ConfigError, match="line 4"):
        rows_of(tiny_llama, train_file=str(path))
    with caplog.at_level(logging.WARNING):
        rows, _ = rows_of(tiny_llama, train_file=str(path), on_bad_row="skip")
    path.write_text(lines(good))
    assert rows == rows_of(tiny_llama, train_file=str(path))[0]
    assert "left out 3 rows, which cannot be read" in caplog.text
    for words in ("line 4)", "line 6)", "row 3 (line 5)"):
        assert words in caplog.text
    path.write_text("\n" + lines([good[0], {"prompt": "w1", "completion": None}]))
    with pytest.raises(ConfigError, match=r"row 2 \(line 3\)"):
        rows_of(tiny_llama, train_file=str(path))
    path.write_text(lines([*ROWS, {"text": "w1", "label": None}, {"text": None, "label": "no"}]))
    with pytest.raises(ConfigError, match=r"without a label.*--on-bad-row skip"):
        rows_of(tiny_llama, task="text-classification", train_file=str(path))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        kept, held = rows_of(
            tiny_llama,
            task="text-classification",
            train_file=str(path),
            eval_file=str(path),
            on_bad_row="skip",
        )
    assert len(kept) == len(held) == len(ROWS)
    assert "a row without a label" in caplog.text and "does not have" not in caplog.text
    assert all(f"{path}, {use} " in caplog.text for use in ("train", "eval"))
    path.write_text(lines([{"prompt": "w1", "completion": None}]))
    with pytest.raises(ConfigError, match="no row"):
        rows_of(tiny_llama, train_file=str(path), on_bad_row="skip")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("size", "apart"), [(0.25, 3), (5, 5)])
def test_rows_are_kept_apart_to_evaluate_on(
    size: float, apart: int, tiny_llama: Path, tmp_path: Path
) -> None:
    """A share or a number, drawn by the seed over all sources: no row is both learned from and evaluated
    on.
    """
    for name, some in (("a", ROWS[:4]), ("b", ROWS[4:])):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"text": row["text"]} for row in some]))
    settings = {"train_file": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], "val_set_size": size}
    kept, evaluated = rows_of(tiny_llama, **settings)
    assert (len(kept), len(evaluated or ())) == (12 - apart, apart)
    assert {tuple(row["input_ids"]) for row in kept}.isdisjoint(
        tuple(row["input_ids"]) for row in evaluated or ()
    )
    assert (kept, evaluated) == rows_of(tiny_llama, **settings)
    assert (kept, evaluated) != rows_of(tiny_llama, **settings, seed=1)
    (pack,) = train(config(tiny_llama, tmp_path, **settings, eval_strategy="steps", eval_steps=1))
    training = pack.manifest.training
    assert [one["step"] for one in training["evaluations"]] == list(range(1, training["steps"] + 1))
    # six digits
    assert training["evaluations"][-1]["loss"] == pytest.approx(pack.manifest.metrics[0]["value"], rel=1e-5)
    assert {(metric["name"], metric["dataset"], metric["n"]) for metric in pack.manifest.metrics} == {
        ("loss", "a.jsonl, b.jsonl", apart)
    }
    assert [entry["id"] for entry in pack.manifest.training["datasets"]] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ConfigError, match="val_set_size leaves no rows"):
        rows_of(tiny_llama, **{**settings, "val_set_size": 12})


def test_rows_that_say_the_same_are_left_out(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What their tokens say, over all sources, whatever their other columns are; and pairs of answers."""
    (tmp_path / "a.jsonl").write_text(
        lines([{"text": "w1", "id": 1}, {"text": "w2"}, {"text": "w1", "id": 2}])
    )
    (tmp_path / "b.jsonl").write_text(lines([{"text": "w2"}, {"text": "w3"}, {"text": "w3"}]))
    settings = {"train_file": str(tmp_path / "a.jsonl"), "eval_file": str(tmp_path / "b.jsonl")}
    with caplog.at_level("INFO"):
        kept, evaluated = rows_of(tiny_llama, **settings, drop_duplicates=True)
    assert (len(kept), len(evaluated or ())) == (2, 1)
    assert [record.message for record in caplog.records if "before" in record.message] == [
        "left out 1 row that occurred before",
        "left out 2 rows that occurred before",
    ]
    pair = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
    (tmp_path / "pairs.jsonl").write_text(lines([pair, {**pair, "rejected": "w4"}, pair]))
    values = {"base_model": "x", "output_dir": "y", "trainer": "dpo", "drop_duplicates": True}
    (judged,), _ = read_config({**values, "train_file": str(tmp_path / "pairs.jsonl")})
    rows, nothing = tables(judged, pairs_of_answers)
    assert (len(rows), nothing) == (2, None)


# --- packing


def tiny(kind: str) -> Any:
    """A random model of a family in float64, with a sliding window that is shorter than its rows where there
    is one.
    """
    common = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    configs = {
        "llama": lambda: transformers.LlamaConfig(**common, num_key_value_heads=2),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=96, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
        "mistral": lambda: transformers.MistralConfig(**common, num_key_value_heads=2, sliding_window=4),
        "gemma2": lambda: transformers.Gemma2Config(
            **common, num_key_value_heads=2, head_dim=8, sliding_window=4
        ),
        "bloom": lambda: transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[kind]()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2"])
def test_packed_rows_have_the_losses_and_gradients_of_rows_alone(kind: str) -> None:
    """In float64, to its roundings: with an adapter, padding between rows of a batch, and rows longer than a
    sliding window.
    """
    model = adapt(tiny(kind), LoRA(r=2, targets="all-linear")).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(len(parameter))
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]}
        for ids in (rng.integers(1, 96, length).tolist() for length in (3, 11, 7, 9, 2, 14, 5))
    ]
    bins = packing.pack_sequences(rows, 20)
    assert sorted(len(one["input_ids"]) for one in bins) == [12, 19, 20]
    packing.require_apart(model, rows)

    def total(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(
            **{key: value for key, value in batch.items() if key != "labels"}, use_cache=False
        ).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum"
        )

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [value for value in model.parameters() if value.requires_grad]))

    alone = sum(total(data.Collator(0)([row])) for row in rows)
    together = total(data.Collator(0)(bins))
    torch.testing.assert_close(together, alone, rtol=1e-7, atol=0)  # some models make their waves in float32
    for ours, theirs in zip(gradients(together), gradients(alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_model_that_mixes_packed_rows_is_refused(tiny_llama: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """Bloom takes no positions; a prompt in front of a packed row stands in front of one of its rows only;
    classifiers learn of rows.
    """
    rows = [{"input_ids": list(range(1, 9)), "labels": [1] * 8}] * 2
    with pytest.raises(Unsupported, match="takes no position_ids"):
        packing.require_apart(tiny("bloom"), rows)
    (tmp_path / "rows.jsonl").write_text(lines([{"text": row["text"]} for row in ROWS]))
    (tmp_path / "labels.jsonl").write_text(lines(ROWS))
    settings = config(tiny_llama, tmp_path, train_file=str(tmp_path / "rows.jsonl"), packing=True)
    with pytest.raises(Unsupported, match="does not keep packed rows apart"):
        train({key: value for key, value in settings.items() if key != "r"} | {"method": "prompt_tuning"})
    with pytest.raises(ConfigError, match="only rows of language models"):
        train(
            {
                **config(tiny_bert, tmp_path),
                "task": "text-classification",
                "packing": True,
                "train_file": str(tmp_path / "labels.jsonl"),
            }
        )
    (pack,) = train(settings)
    assert pack.manifest.training["rows"] == 2  # of 12 rows of 3 tokens, 10 fit into 32


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_every_row_is_in_one_pack(lengths: list[int]) -> None:
    """None is lost, cut or mixed, no pack is too long, and no two could be one."""
    rows = [
        {"input_ids": [number] * length, "labels": [number] * length} for number, length in enumerate(lengths)
    ]
    bins = packing.pack_sequences(rows, 30)
    held = [
        number
        for one in bins
        for number, position in zip(one["input_ids"], one["position_ids"], strict=True)
        if position == 0
    ]
    assert sorted(held) == list(range(len(rows)))
    assert sum(len(one["input_ids"]) for one in bins) == sum(lengths)
    widths = sorted(len(one["input_ids"]) for one in bins)
    assert widths[-1] <= 30
    assert len(widths) < 2 or widths[0] + widths[1] > 30


# --- preferences


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "w1", "chosen": "w2", "rejected": "w3"},
            {"prompt": "w1", "chosen": "w2", "rejected": "w3"},
        ),
        (
            {"chosen": [user("w1"), assistant("w2")], "rejected": [user("w1"), assistant("w3")]},
            {"chosen": [user("w1"), assistant("w2")], "rejected": [user("w1"), assistant("w3")]},
        ),
        (
            {
                "instruction": "w1",
                "input": "w4",
                "system": "w0",
                "history": [["w8", "w9"]],
                "chosen": "w2",
                "rejected": "w3",
            },
            {
                "prompt": [
                    {"role": "system", "content": "w0"},
                    user("w8"),
                    assistant("w9"),
                    user("w1\n\nw4"),
                ],
                "chosen": [assistant("w2")],
                "rejected": [assistant("w3")],
            },
        ),
        (
            {
                "conversations": [{"from": "human", "value": "w1"}],
                "chosen": {"from": "gpt", "value": "w2"},
                "rejected": {"from": "gpt", "value": "w3"},
            },
            {"prompt": [user("w1")], "chosen": [assistant("w2")], "rejected": [assistant("w3")]},
        ),
        (
            {"prompt": "w1", "completion": "w2", "label": "True"},
            {"prompt": "w1", "completion": "w2", "label": True},
        ),
    ],
)
def test_preferences_are_rows_of_trl(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """Whatever form they have; a row of another one is named."""
    rows = Dataset.from_list([row])
    read, other = (
        (pairs_of_answers, labelled_answers) if "label" not in row else (labelled_answers, pairs_of_answers)
    )
    assert read(rows, DataReport("here")) == [expected]
    with pytest.raises(ConfigError, match="no form of preferences"):
        other(rows, DataReport("here"))
    spoiled = dict.fromkeys({"chosen", "label"} & row.keys())
    with pytest.raises(ConfigError, match="row 1"):
        read(Dataset.from_list([{**row, **spoiled}]), DataReport("here"))


def test_axolotls_type_alpaca_is_alpacas_prompt(tiny_llama: Path, tmp_path: Path) -> None:
    """Word for word, also where the tokenizer has a chat template; the answer alone is learned, with the end
    token. The form alpaca stays the instruction as a user's turn.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% for message in messages %}w9 {{ message['content'] }} {% endfor %}"
    learned = get_task("text-generation").training
    assert learned is not None
    alone = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n"
        "### Instruction:\nw1\n\n### Response:\n"
    )
    both = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nw1\n\n### "
        "Input:\nw2\n\n### Response:\n"
    )
    for row, prompt in (({"input": ""}, alone), ({"input": "w2"}, both), ({}, alone)):
        (tmp_path / "rows.jsonl").write_text(lines([{"instruction": "w1", "output": "w3 w4", **row}]))
        (source,) = sources_of([{"path": str(tmp_path / "rows.jsonl"), "type": "alpaca"}], "here")
        report = DataReport("here", reading=RowReading(source.form))
        (encoded,) = learned.encode(data.load_rows(source), tokenizer, 512, report, None)
        before, answer = (
            tokenizer(prompt)["input_ids"],
            tokenizer("w3 w4", add_special_tokens=False)["input_ids"],
        )
        assert encoded["input_ids"] == [*before, *answer, tokenizer.eos_token_id]
        assert encoded["labels"] == [-100] * len(before) + encoded["input_ids"][len(before) :]
    (encoded,) = learned.encode(
        data.load_rows(source), tokenizer, 512, DataReport("here", reading=RowReading("alpaca")), None
    )
    assert tokenizer.decode(encoded["input_ids"]).startswith("w9 w1")


def test_chats_with_a_verdict_are_rows_of_trl() -> None:
    """The last answer is judged; the conversation before it is the prompt."""
    rows = Dataset.from_list(
        [{"messages": [user("w1"), assistant("w2"), user("w3"), assistant("w4")], "label": True}]
    )
    (row,) = labelled_answers(rows, DataReport("here", reading=RowReading("labelled-chats")))
    assert row == {
        "prompt": [user("w1"), assistant("w2"), user("w3")],
        "completion": [assistant("w4")],
        "label": True,
    }


def test_a_form_may_be_named_for_text_to_text_as_well(tiny_llama: Path) -> None:
    """Rows that fit two forms are read as the one that is named, which is not refused as a form that nobody
    chooses.
    """
    rows = Dataset.from_list([{"prompt": "w1", "completion": "w2", "text": "w3"}])
    report = DataReport("here", reading=RowReading("prompt-completion"))
    encode = get_task("text2text-generation").training.encode  # type: ignore[union-attr]
    assert len(encode(rows, AutoTokenizer.from_pretrained(tiny_llama), 8, report, None)) == 1
    assert (report.form, report.reading.form) == ("prompt-completion", None)


def test_preferences_of_several_files_are_one_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LLaMA-Factory's pairs and ShareGPT's side by side, one row left out; texts and messages together are
    refused.
    """

    def written(name: str, rows: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text(lines(rows))
        return str(tmp_path / name)

    alpaca = written(
        "alpaca.jsonl",
        [
            {"instruction": "w1", "chosen": "w2", "rejected": "w3"},
            {"instruction": "w1", "chosen": "w2", "rejected": None},
        ],
    )
    chats = written(
        "chats.jsonl",
        [
            {
                "conversations": [{"from": "human", "value": "w4"}],
                "chosen": {"from": "gpt", "value": "w5"},
                "rejected": {"from": "gpt", "value": "w6"},
            }
        ],
    )
    texts = written("texts.jsonl", [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}])
    values = {"base_model": "x", "output_dir": "y", "method": "lora", "trainer": "dpo", "on_bad_row": "skip"}
    (config,), _ = read_config({**values, "train_file": [alpaca, chats]})
    with caplog.at_level(logging.INFO):
        rows, apart = tables(config, pairs_of_answers)
    assert apart is None
    said = [
        line.split()[1:4] for line in caplog.messages if line.startswith(f"{tmp_path}/") and "-pairs" in line
    ]
    assert said == [["alpaca-pairs", "1", "-"], ["sharegpt-pairs", "1", "-"]]  # which are not 0 tokens
    assert [(row["prompt"][-1]["content"], row["chosen"][0]["content"]) for row in rows] == [
        ("w1", "w2"),
        ("w4", "w5"),
    ]
    (config,), _ = read_config({**values, "train_file": [alpaca, texts]})
    with pytest.raises(ConfigError, match="rows of different kinds"):
        tables(config, pairs_of_answers)


@pytest.mark.parametrize("columns", text_classification.COLUMNS)
def test_texts_have_the_names_that_data_sets_give_them(columns: tuple[str, ...], tiny_bert: Path) -> None:
    """One text or two, by each of the names; both go to the tokenizer."""
    rows = Dataset.from_list([{**{name: f"w{at}" for at, name in enumerate(columns)}, "label": "a"}])
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    (row,) = text_classification.encode(rows, tokenizer, 9, "here", Labels(("a", "b"), ONE))
    assert row["input_ids"] == tokenizer(*(f"w{at}" for at in range(len(columns))))["input_ids"]


def test_a_column_by_another_name_hides_one_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label,body\nid1,x,w1 w2\n")
    (source,) = sources_of({"path": str(path), "columns": {"text": "body"}}, "here")
    assert data.load_rows(source)[0] == {"label": "x", "text": "w1 w2"}
