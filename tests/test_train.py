"""Training from a configuration to a pack: data, results, what is refused, and what is left behind when it
fails.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, are_progress_bars_disabled, enable_progress_bars
from notebooks import page_in_notebook
from processes import child
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    T5Config,
)

import adapterpack
from adapterpack import LoRA, Pack, adapt, attach, load, save, train
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.errors import (
    AdapterpackError,
    ConfigError,
    NonFinite,
    OutputExists,
    StorageError,
    UnknownName,
    Unsupported,
)
from adapterpack.tasks import text_classification, text_generation
from adapterpack.tasks.data.problems import labels_in
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.canaries.canary import verify_canary
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.training.config.config import as_mapping, read_config
from adapterpack.training.data import load as data
from adapterpack.training.loop.out_of_memory import memory_errors
from adapterpack.training.pipeline import train_one

TEXT = "text-classification"
CAUSAL = {"task": "text-generation"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The data sets' cache in a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield folder


def labelled(seed: int, count: int) -> list[dict[str, str]]:
    """Rows that words tell apart: w0 to w5 for ``no``, w40 to w45 for ``yes``, among words that tell
    nothing.
    """
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        start = 40 * (number % 2)
        words = [f"w{rng.randrange(start, start + 6)}" for _ in range(3)] + [
            f"w{rng.randrange(70, 90)}" for _ in range(rng.randrange(4))
        ]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": ("no", "yes")[number % 2]})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(base: Path, folder: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A short run on ``rows``, written to ``folder/pack``."""
    return {
        "model_name_or_path": str(base),
        "train_file": write(folder / "rows.jsonl", rows),
        "output_dir": str(folder / "pack"),
        "learning_rate": 1e-2,
        "max_steps": 2,
        "max_length": 32,
        "r": 4,
        **more,
    }


def classify(base: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return settings(base, folder, labelled(0, 64), task=TEXT, **more)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- classification


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_batches_of_a_step_count_as_one(smoothing: float, tiny_bert: Path, tmp_path: Path) -> None:
    """A classifier that ignores how many rows a step has gets the mean over all of them, in training and in
    evaluation: the same pack and the same losses, to what float32 rounds.
    """
    base = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**settings, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    config = classify(
        base, tmp_path, max_steps=4, label_smoothing_factor=smoothing, val_set_size=5, max_grad_norm=0.1
    )
    (one,), (two,) = (
        train(
            {
                **config,
                "output_dir": str(tmp_path / name),
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": count,
            }
        )
        for name, size, count in (("one", 8, 1), ("two", 2, 4))
    )
    for pair in zip(one.tensors.values(), two.tensors.values(), strict=True):
        np.testing.assert_allclose(*pair, atol=1e-5)
    assert two.manifest.training["losses"] == [
        {"step": point["step"], "loss": pytest.approx(point["loss"], rel=1e-4)}
        for point in one.manifest.training["losses"]
    ]
    assert two.manifest.metrics[-1]["value"] == pytest.approx(one.manifest.metrics[-1]["value"], rel=1e-4)


def test_a_classifier_learns(tiny_bert: Path, tmp_path: Path) -> None:
    """Two labels told by words: on held-out rows the accuracy is over 0.95 (chance is 0.5) and the loss below
    half of ln 2; what the manifest claims is what the pack gives when it is attached to the base again;
    labels, canary, fingerprint, training facts are there.
    """
    held_out = labelled(1, 50)
    held_out[0]["text"] += " " + " ".join(["w75"] * 40)  # longer than max_length
    (pack,) = train(
        {**classify(tiny_bert, tmp_path, max_steps=60), "eval_file": write(tmp_path / "test.jsonl", held_out)}
    )
    assert adapterpack.validate(tmp_path / "pack", tiny_bert).valid
    again = load(tmp_path / "pack")
    assert again.id == pack.id
    manifest = again.manifest
    assert (manifest.task.type, manifest.task.labels) == (TEXT, ("no", "yes"))
    assert (manifest.base.structure, manifest.base.content) == Checkpoint(tiny_bert).fingerprint()[:2]
    claims = {metric["name"]: metric for metric in manifest.metrics}
    assert all((metric["dataset"], metric["n"]) == ("test.jsonl", 50) for metric in claims.values())
    assert claims["accuracy"]["value"] > 0.95
    assert claims["loss"]["value"] < np.log(2) / 2
    assert manifest.training["final_loss"] < np.log(2)
    assert {
        "objective": TEXT,
        "rows": 64,
        "steps": 60,
        "seed": 0,
        "precision": "float32",
    }.items() <= manifest.training.items()

    model = attach(load_model(get_task(TEXT), tiny_bert).eval(), again)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    scores = []
    with torch.no_grad():
        for row in held_out:
            ids = tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")["input_ids"]
            scores.append((model(input_ids=ids).logits[0].double(), manifest.task.labels.index(row["label"])))
    accuracy = np.mean([float(values.argmax()) == label for values, label in scores])
    loss = np.mean([float(torch.logsumexp(values, 0) - values[label]) for values, label in scores])
    assert abs(accuracy - claims["accuracy"]["value"]) < 1e-9
    assert abs(loss - claims["loss"]["value"]) < 1e-5  # rows alone here, padded batches there
    assert verify_canary(model, again) < 1e-5


def test_the_same_seed_gives_the_same_pack(tiny_bert: Path, tmp_path: Path) -> None:
    """Twice the same configuration: the same pack id, so the same bytes; dropout and the order of rows
    included. Another seed: another.
    """
    ids = []
    for number, seed in enumerate((0, 0, 1)):
        config = classify(tiny_bert, tmp_path, max_steps=4, dropout=0.1, seed=seed, name="p")
        torch.manual_seed(number)  # what the process drew before does not matter
        (pack,) = train({**config, "output_dir": str(tmp_path / str(number))})
        ids.append(pack.id)
    assert ids[0] == ids[1] != ids[2]


def test_the_seed_is_the_adapters(tiny_bert: Path, tmp_path: Path) -> None:
    """With a learning rate of nothing, A is what ``adapt`` draws from that seed: a step moves it by 1e-12 at
    most.
    """
    for seed in (0, 5):
        (pack,) = train(
            {
                **classify(tiny_bert, tmp_path, learning_rate=1e-12, seed=seed),
                "output_dir": str(tmp_path / f"s{seed}"),
            }
        )
        fresh = adapt(
            load_model(get_task(TEXT), tiny_bert, ["no", "yes"]),
            LoRA(r=4, modules_to_save=("classifier",)),
            "f",
            seed,
        )
        expected = {
            adapter.site.path: adapter.params["lora_A"]
            for adapter in save(fresh, None, adapter="f").adapters()
        }
        for adapter in pack.adapters():
            np.testing.assert_allclose(adapter.params["lora_A"], expected[adapter.site.path], atol=1e-9)


@pytest.mark.fast
def test_new_modules_are_trained_whole(tiny_bert: Path, tmp_path: Path) -> None:
    """DistilBERT's task model adds two modules to its base. Both are drawn anew on every load, so both are in
    the pack, and a model loaded under another seed gives the trained logits.
    """
    base = tmp_path / "distil"
    torch.manual_seed(3)
    DistilBertModel(
        DistilBertConfig(
            vocab_size=96,
            dim=24,
            n_layers=1,
            n_heads=3,
            hidden_dim=40,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    ).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert / name, base)
    (pack,) = train(classify(base, tmp_path))
    assert sorted(pack.full()) == ["classifier", "pre_classifier"]
    assert not any("classifier" in adapter.site.path for adapter in pack.adapters())
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = attach(
            AutoModelForSequenceClassification.from_pretrained(base).eval(), load(tmp_path / "pack")
        )
        assert verify_canary(model, pack) < 1e-5
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([[5, 6, 7]])).logits)
    assert torch.equal(*found)


def test_a_base_with_a_head_for_other_labels(tiny_bert: Path, tmp_path: Path) -> None:
    """A checkpoint that is itself a classifier of five labels trains on two: its head is drawn anew, and said
    in the pack.
    """
    base = tmp_path / "five"
    AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=5).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(base)
    (pack,) = train(classify(base, tmp_path))
    assert pack.full()["classifier"]["weight"].shape == (2, 24)
    assert adapterpack.validate(tmp_path / "pack", base).valid


def test_a_checkpoint_of_another_architecture_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    """A checkpoint without the model's weights would be a random base: refused, not trained whole."""
    base = tmp_path / "wrong"
    base.mkdir()
    for path in tiny_bert.iterdir():
        shutil.copy(path, base)
    state = AutoModel.from_pretrained(tiny_bert).state_dict()
    save_file(
        {f"other.{name}": value.contiguous() for name, value in state.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(Unsupported, match="less than half"):
        train(classify(base, tmp_path))


def test_a_decoder_classifies(tiny_llama: Path, tmp_path: Path) -> None:
    """A causal base gets a ``score`` head; without a padding token in its config batches still work."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text())
    del config["pad_token_id"]
    (base / "config.json").write_text(json.dumps(config))
    (pack,) = train(classify(base, tmp_path))
    assert sorted(pack.full()) == ["score"]
    assert pack.manifest.task.architecture == "LlamaForSequenceClassification"


def test_settings_reach_the_trainer(tiny_bert: Path, tmp_path: Path) -> None:
    """bfloat16, gradient checkpointing, accumulation, a schedule with warm-up, a chosen part of the rows: two
    steps, said in the pack.
    """
    (pack,) = train(
        classify(
            tiny_bert,
            tmp_path,
            bf16=True,
            gradient_checkpointing=True,
            gradient_accumulation_steps=2,
            warmup_steps=0.5,
            lr_scheduler_type="cosine",
            skip_train_samples=10,
            max_train_samples=20,
            max_steps=-1,
            num_train_epochs=1,
            per_device_train_batch_size=8,
        )
    )
    assert {"rows": 20, "steps": 2, "precision": "bf16"}.items() <= pack.manifest.training.items()
    assert {value.dtype for value in pack.tensors.values()} == {np.dtype(np.float32)}
    assert all(
        np.any(adapter.params["lora_B"]) for adapter in pack.adapters() if "pooler" not in adapter.site.path
    )


# --- data files


def _rows() -> list[dict[str, str]]:
    return [{"text": 'w1 "w2", w3', "label": "no"}, {"text": "w44", "label": "yes"}]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("stored", "asked", "held"),
    [
        ("bfloat16", {}, "bfloat16"),
        ("float16", {}, "float32"),
        ("bfloat16", {"dtype": "float32"}, "float32"),
        ("float32", {"dtype": "bfloat16", "gradient_checkpointing": True}, "bfloat16"),
    ],
)
def test_a_base_is_held_in_its_own_dtype(
    stored: str, asked: dict[str, Any], held: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """As its checkpoint stores it, float16 in float32, or in the one of the configuration; the adapter and a
    new head are trained in float32 and learn, and the pack fits the base however that is loaded.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=getattr(torch, stored)).save_pretrained(base)
    (config,), _ = read_config(settings(base, tmp_path, labelled(0, 32), task=TEXT, max_steps=30, **asked))
    pack, model = train_one(config)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in model.named_parameters()}
    assert {dtypes[name] for name in trained} == {"float32"}
    assert {dtypes[name] for name in dtypes.keys() - trained} == {held}
    assert any("score" in name for name in trained)
    assert pack.manifest.training["final_loss"] < 0.9 * np.log(2)
    for dtype in ("float32", "bfloat16"):
        attach(load_model(get_task(TEXT), base, ["no", "yes"], dtype=dtype), load(tmp_path / "pack"))


def test_csv_and_parquet_and_json_are_the_same_rows(tiny_bert: Path, tmp_path: Path) -> None:
    """One set of rows in four kinds of file gives the same ids and labels; training works on each kind."""
    rows = _rows()
    write(tmp_path / "r.jsonl", rows)
    (tmp_path / "r.json").write_text(json.dumps(rows))
    with (tmp_path / "r.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "r.parquet")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    for kind in ("jsonl", "json", "csv", "parquet"):
        loaded = data.load_rows(str(tmp_path / f"r.{kind}"))
        assert data.labels_in(loaded, get_task(TEXT).training, kind).names == ("no", "yes")
        encoded = text_classification.encode(loaded, tokenizer, 32, kind, labels_in(["no", "yes"], "here"))
        assert [row["labels"] for row in encoded] == [0, 1]
        assert encoded[1]["input_ids"] == [48]
    for kind in ("csv", "parquet"):
        config = {
            **classify(tiny_bert, tmp_path),
            "train_file": str(tmp_path / f"r.{kind}"),
            "output_dir": str(tmp_path / kind),
        }
        (pack,) = train(config, ["max_steps=1"])
        assert pack.manifest.training["datasets"][0]["id"] == f"r.{kind}"


def test_labels_and_pairs(tiny_bert: Path) -> None:
    """Numbers are labels in their own order; two sentences are one input."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    rows = Dataset.from_list(
        [{"sentence1": "w1", "sentence2": "w2 w3", "label": label} for label in (10, 2, 1)]
    )
    labels = data.labels_in(rows, get_task(TEXT).training, "here")
    assert labels.names == ("1", "2", "10")
    encoded = text_classification.encode(rows, tokenizer, 2, "here", labels)
    assert [row["labels"] for row in encoded] == [2, 1, 0]
    assert [len(row["input_ids"]) for row in encoded] == [2, 2, 2]


def test_pairs_are_trained_with_their_types(minilm: Path, tiny_bert: Path, tmp_path: Path) -> None:
    """A model that tells the two texts apart by types sees in training what it sees in a pipeline; one that
    does not is given none.
    """
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = Dataset.from_list(
        [{"sentence1": "a b", "sentence2": "c", "label": label} for label in ("no", "yes")]
    )
    (row, _) = text_classification.encode(rows, tokenizer, 8, "here", labels_in(["no", "yes"], "here"))
    expected = tokenizer("a b", "c")
    assert (row["input_ids"], row["token_type_ids"]) == (expected["input_ids"], expected["token_type_ids"])
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert data.Collator(0)([row, {**row, "input_ids": [5], "token_type_ids": [1]}])[
        "token_type_ids"
    ].tolist()[1] == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rows", "more", "error", "words"),
    [
        (
            [{"txt": "w1", "label": "a"}, {"txt": "w2", "label": "b"}],
            {},
            ConfigError,
            ["columns text and label", "txt, label"],
        ),
        (
            [{"text": "w1"}],
            {},
            ConfigError,
            ["no column of labels", "label or labels", "found text", "label: team"],
        ),
        (
            [{"text": "w1", "label": "a"}, {"text": "w2", "label": None}],
            {},
            ConfigError,
            ["without a label", "row 2"],
        ),
        (
            [{"text": "w1", "label": "a"}, {"text": None, "label": "b"}],
            {},
            ConfigError,
            ["without text", "row 2"],
        ),
        ([{"text": "w1", "label": "a"}], {}, ConfigError, ["at least two labels", "found a"]),
        ([], {}, ConfigError, ["rows.jsonl"]),
        (
            None,
            {"skip_train_samples": 64},
            ConfigError,
            ["skip_train_samples leaves no rows", "less than 64"],
        ),
        (None, {"train_file": "nowhere.csv"}, StorageError, ["no such data file", "nowhere.csv"]),
        (None, {"eval_file": "nowhere.csv"}, StorageError, ["no such data file", "nowhere.csv"]),
        (None, {"model_name_or_path": "./nowhere"}, StorageError, ["no such file or folder", "nowhere"]),
        (
            None,
            {"task": "text-clasification"},
            UnknownName,
            ["'text-clasification'", "did you mean 'text-classification'"],
        ),
        (None, {"task": "fill-mask"}, Unsupported, ["fill-mask", "text-generation"]),
        (None, {"lr_scheduler_type": "liner"}, ConfigError, ["liner"]),
        (None, {"targets": ["qery"]}, AdapterpackError, ["did you mean 'query'"]),
        (
            [{"question": "w1", "answer": "w2"}],
            CAUSAL,
            ConfigError,
            ["no form of rows", "completion + prompt", "question, answer"],
        ),
        (
            [{"prompt": "w1", "completion": None}],
            CAUSAL,
            ConfigError,
            ["form prompt-completion", "row 1", "None"],
        ),
        (
            [{"prompt": None, "completion": "w1"}, {"prompt": "w2", "completion": "w1"}],
            CAUSAL,
            ConfigError,
            ["row 1"],
        ),
        (
            [{"messages": [{"role": "user", "content": "w1"}]}],
            CAUSAL,
            ConfigError,
            ["row 1", "not the assistant's"],
        ),
        ([{"messages": []}], CAUSAL, ConfigError, ["row 1", "form messages"]),
        (
            [{"prompt": "w1 w2 w3", "completion": "w4"}],
            {**CAUSAL, "max_length": 3},
            ConfigError,
            ["longer than max_length"],
        ),
        (
            [{"text": "w1", "label": 0.25}, {"text": "w2", "label": 1.0}],
            {"problem_type": "single_label_classification"},
            ConfigError,
            ["one text or whole number", "row 1", "regression"],
        ),
        (
            None,
            {"problem_type": "several"},
            ConfigError,
            ["problem_type", "multi_label_classification", "'several'"],
        ),
        (
            [{"text": " ".join(["w1"] * 70), "label": str(n)} for n in (0, 1)],
            {"max_length": 99},
            ConfigError,
            ["longer than the model can read", "at most 64", "found 70", "set max_length to 64"],
        ),
        (
            None,
            {**CAUSAL, "train_file": "T5"},
            Unsupported,
            ["no model for the task", "found t5", "text2text-generation"],
        ),
    ],
)
def test_data_errors_are_sentences(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]] | None,
    more: dict[str, Any],
    error: type[AdapterpackError],
    words: list[str],
) -> None:
    """What is wrong, in which file and row, and what was expected; nothing is written."""
    base = request.getfixturevalue("tiny_llama" if more.items() >= CAUSAL.items() else "tiny_bert")
    config = {**settings(base, tmp_path, labelled(0, 64) if rows is None else rows, task=TEXT), **more}
    if more.get("train_file") == "T5":
        folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("t5") / "base"))
        T5Config(
            vocab_size=96,
            d_model=8,
            d_kv=4,
            d_ff=8,
            num_layers=1,
            num_heads=2,
            architectures=["T5ForConditionalGeneration"],
        ).save_pretrained(folder)
        config |= {"model_name_or_path": str(folder), "train_file": str(tmp_path / "rows.jsonl")}
    with pytest.raises(error) as caught:
        train(config)
    for word in words:
        assert word in str(caught.value)
    assert left(tmp_path) == ["rows.jsonl"]


def test_labels_keep_their_names(tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The names that a data set has for its classes are those in the pack; texts of pairs have several names;
    the rest is said.
    """
    features = Features(
        {
            "premise": Value("string"),
            "hypothesis": Value("string"),
            "label": ClassLabel(names=["neg", "pos"]),
            "source": Value("string"),
        }
    )
    columns = {"premise": ["w1", "w2"], "hypothesis": ["w3", "w4"], "label": [1, 0], "source": ["a", "b"]}
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "r.parquet")
    rows = data.load_rows(str(tmp_path / "r.parquet"))
    labels = data.labels_in(rows, get_task(TEXT).training, "here")
    assert labels.names == ("neg", "pos")
    with caplog.at_level(logging.WARNING):
        encoded = text_classification.encode(
            rows, AutoTokenizer.from_pretrained(tiny_bert), 1, "here", labels
        )
    assert [row["labels"] for row in encoded] == [1, 0]
    assert "here: read as premise + hypothesis; these columns are not read: source" in caplog.text
    assert "here: 2 of 2 rows are cut at max_length (1)" in caplog.text


def test_running_out_of_memory_is_advised(tiny_bert: Path, tmp_path: Path) -> None:
    """A batch that no machine holds: the settings that save memory, by name."""
    config = read_config(classify(tiny_bert, tmp_path, gradient_checkpointing=True))[0][0]
    with (
        pytest.raises(
            AdapterpackError,
            match=r"does not fit into memory.*per_device_train_batch_size=4, bf16=true, max_length=16",
        ),
        memory_errors(config),
    ):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="mat1"), memory_errors(config):
        torch.ones(2, 3) @ torch.ones(2, 3)


TOO_LARGE = """
import json, resource, sys
from pathlib import Path
import adapterpack
large, small = (json.loads(Path(name).read_text()) for name in sys.argv[1:])
adapterpack.train(small)  # everything is loaded that takes memory of its own
used = int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (128 << 20),) * 2)
adapterpack.train(large)
"""


def test_a_batch_that_does_not_fit_is_made_smaller(tiny_llama: Path, tmp_path: Path) -> None:
    """Where memory has a limit, a step of 768 rows is cut into batches that fit; the pack is that of a run
    with these settings, its loss that of a whole batch, and it claims what it was trained with.
    """
    rng = random.Random(0)
    rows = [{"text": " ".join(f"w{rng.randrange(90)}" for _ in range(60))} for _ in range(768)]
    whole = settings(
        tiny_llama,
        tmp_path,
        rows,
        max_steps=1,
        max_length=60,
        per_device_train_batch_size=768,
        gradient_accumulation_steps=1,
        dropout=0.0,
    )
    asked = {**whole, "auto_find_batch_size": True, "output_dir": str(tmp_path / "found")}
    warm = {**whole, "per_device_train_batch_size": 1, "output_dir": str(tmp_path / "warm")}
    for name, values in (("large", asked), ("small", warm)):
        (tmp_path / name).write_text(json.dumps(values))
    command = [sys.executable, "-c", TOO_LARGE, tmp_path / "large", tmp_path / "small"]
    with child(command, stdout=-1, stderr=-1) as process:
        errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors[-3000:]
    found = load(tmp_path / "found")
    claimed = found.manifest.training["config"]
    batch, parts = (claimed[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert batch * parts == 768 and batch <= 384
    assert f"it goes on with per_device_train_batch_size={batch} and" in errors
    (again,) = train(
        {
            **whole,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": parts,
            "output_dir": str(tmp_path / "again"),
        }
    )
    assert all(np.array_equal(again.tensors[name], found.tensors[name]) for name in found.tensors)
    (one,) = train({**whole, "output_dir": str(tmp_path / "one")})
    assert [step["loss"] for step in found.manifest.training["losses"]] == pytest.approx(
        [step["loss"] for step in one.manifest.training["losses"]], rel=1e-5
    )


@pytest.mark.parametrize("trainer", ["contrastive", "kto"])
def test_rows_that_a_trainer_compares_stay_together(tiny_bert: Path, tmp_path: Path, trainer: str) -> None:
    """Smaller batches would be another loss."""
    with pytest.raises(ConfigError, match=f"the trainer {trainer} compares the rows of a batch"):
        train(
            {
                "model_name_or_path": str(tiny_bert),
                "train_file": write(tmp_path / "r.jsonl", []),
                "output_dir": str(tmp_path / "pack"),
                "trainer": trainer,
                "task": "feature-extraction" if trainer == "contrastive" else "text-generation",
                "auto_find_batch_size": True,
            }
        )


def test_a_label_that_only_the_evaluation_has(tiny_bert: Path, tmp_path: Path) -> None:
    """It is named with its row, before training."""
    held_out = write(tmp_path / "e.jsonl", [*labelled(1, 2), {"text": "w1", "label": "maybe"}])
    with pytest.raises(
        ConfigError, match=r"training data does not have.*e\.jsonl, row 3; expected no, yes, found maybe"
    ):
        train(classify(tiny_bert, tmp_path, eval_file=held_out))


def test_data_that_cannot_be_read(tmp_path: Path) -> None:
    """A broken file is a sentence on one line."""
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"\n{"text"')
    with pytest.raises(ConfigError, match=r"cannot be read.*broken\.jsonl") as caught:
        data.load_rows(str(tmp_path / "broken.jsonl"))
    assert "\n" not in str(caught.value)


# --- causal language models: ids by hand. The word wN has the id N + 4; the end token is 2.

P, E, X = [5, 6], 2, -100
TEMPLATE = (
    "{% for m in messages %}w90 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w91{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [
        ({"prompt": "w1 w2", "completion": "w3"}, [5, 6, 7, E], [X, X, 7, E]),
        (
            {
                "messages": [
                    {"role": "user", "content": "w1"},
                    {"role": "user", "content": "w2"},
                    {"role": "assistant", "content": "w3 w4"},
                ]
            },
            [5, 6, 7, 8, E],
            [X, X, 7, 8, E],
        ),
        ({"instruction": "w1", "input": "w2", "output": "w3"}, [5, 6, 7, E], [X, X, 7, E]),
        ({"instruction": "w1", "input": "", "output": "w3"}, [5, 7, E], [X, 7, E]),
        ({"instruction": "w1", "output": "w3"}, [5, 7, E], [X, 7, E]),
        ({"text": "w1 w2"}, [5, 6, E], [5, 6, E]),
    ],
)
def test_labels_are_masked_on_the_prompt(
    tiny_llama: Path, row: dict[str, Any], ids: list[int], labels: list[int]
) -> None:
    """The loss is on the completion and the end token alone, in every form of data."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert text_generation.encode(Dataset.from_list([row]), tokenizer, 32, "here") == [
        {"input_ids": ids, "labels": labels}
    ]


def test_a_chat_template_renders_the_prompt(tiny_llama: Path) -> None:
    """The template's words and its opening of the answer are prompt; the answer is learnt as it stands."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    rows = Dataset.from_list([{"prompt": "w1", "completion": "w3"}])
    assert text_generation.encode(rows, tokenizer, 32, "here") == [
        {"input_ids": [94, 5, 95, 7, E], "labels": [X, X, X, 7, E]}
    ]
    text = Dataset.from_list([{"text": "w1"}])
    assert text_generation.encode(text, tokenizer, 32, "here") == [{"input_ids": [5, E], "labels": [5, E]}]


TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w91 {{ m.content }} <end>\n{% else %}w90 {{ "
    "m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}w91 {% endif %}"
)
"""As Gemma and Phi-3 have it: a turn ends with a token that is not the tokenizer's end token."""


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "w1"},
                {"role": "assistant", "content": "w2"},
                {"role": "user", "content": "w3"},
                {"role": "assistant", "content": "w4 w5"},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "w1"},
                {"from": "gpt", "value": "w2"},
                {"from": "human", "value": "w3"},
                {"from": "gpt", "value": "w4 w5"},
            ]
        },
        {"instruction": "w3", "output": "w4 w5", "history": [["w1", "w2"]]},
        {
            "prompt": [
                {"role": "user", "content": "w1"},
                {"role": "assistant", "content": "w2"},
                {"role": "user", "content": "w3"},
            ],
            "completion": [{"role": "assistant", "content": "w4 w5"}],
        },
    ],
    ids=lambda row: next(iter(row)),
)
def test_every_turn_of_the_assistant_is_learned_with_the_templates_own_end(
    tiny_llama: Path, row: dict[str, Any]
) -> None:
    """In each form of chats; of a prompt with turns in it, the completion alone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TURNS
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    ((found),) = text_generation.encode(Dataset.from_list([row]), tokenizer, 32, "here")
    end, first = 96, [X, X] if "prompt" in row else [6, 96]
    assert found["input_ids"] == [94, 5, 95, 6, end, 94, 7, 95, 8, 9, end]
    assert found["labels"] == [X, X, X, *first, X, X, X, 8, 9, end]


def test_what_is_not_learned_is_said(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Columns that nobody reads, turns that a template renders otherwise later, rows that are cut; a long
    text becomes several rows.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    chat = [
        {"role": role, "content": word}
        for role, word in (("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"))
    ]
    with caplog.at_level(logging.WARNING):
        text_generation.encode(Dataset.from_list([{"messages": chat, "source": "x"}]), tokenizer, 32, "glued")
        tokenizer.chat_template = TURNS.replace(
            "{{ m.content }} <end>", "{{ m.content if loop.last else 'w0' }} <end>"
        )
        (forgotten,) = text_generation.encode(
            Dataset.from_list([{"messages": chat}]), tokenizer, 32, "forgotten"
        )
        text_generation.encode(
            Dataset.from_list([{"prompt": "w1", "completion": "w2 w3 w4"}]), tokenizer, 5, "cut"
        )
        long = text_generation.encode(Dataset.from_list([{"text": "w1 w2 w3 w4"}]), tokenizer, 2, "long")
    assert "glued: read as messages; these columns are not read: source" in caplog.text
    assert "glued: learned in part 1 of 1 row" in caplog.text
    assert "forgotten: learned in part 1 of 1 row" in caplog.text
    assert sum(label != X for label in forgotten["labels"]) == forgotten["labels"][::-1].index(X)
    assert "cut: cut 1 of 1 row at max_length (5)" in caplog.text
    # a last piece of one token has nothing to learn: it would be told by no token before it
    assert [row["input_ids"] for row in long] == [[5, 6], [7, 8]]
    assert "long" not in caplog.text


@pytest.mark.parametrize(
    ("single", "begins"), [("[BOS] $A", [1]), ("[BOS] $A [EOS]", [1]), ("$A [EOS]", []), ("[EOS] $A", [2])]
)
def test_tokens_that_the_tokenizer_adds(tiny_llama: Path, single: str, begins: list[int]) -> None:
    """What begins every text begins the prompt, of plain text too, and is not learnt; an end token never
    stands before the answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    if begins == [2]:
        tokenizer.bos_token = tokenizer.eos_token
    mask = [X] * len(begins)
    for row, prompt in (({"prompt": "w1", "completion": "w3"}, [5]), ({"text": "w3"}, [])):
        (found,) = text_generation.encode(Dataset.from_list([row]), tokenizer, 32, "here")
        assert found == {"input_ids": [*begins, *prompt, 7, E], "labels": [*mask, *[X] * len(prompt), 7, E]}


def test_long_rows(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cut at the end; a row of which only prompt would be left is left out, and that is said: its loss would
    be 0/0.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = Dataset.from_list(
        [{"prompt": "w1 w2", "completion": "w3 w4"}, {"prompt": "w1 w2 w3", "completion": "w4"}]
    )
    with caplog.at_level(logging.WARNING):
        assert text_generation.encode(rows, tokenizer, 3, "here") == [
            {"input_ids": [5, 6, 7], "labels": [X, X, 7]}
        ]
    assert "here: left out 1 of 2 rows" in caplog.text


def test_a_tokenizer_without_an_end_token(tiny_llama: Path) -> None:
    """The model could not learn where to stop: refused."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        text_generation.encode(Dataset.from_list([{"text": "w1"}]), tokenizer, 3, "here")


def test_collation() -> None:
    """Right padding; masked positions have mask 0 and, in sequences, the ignored label."""
    batch = data.Collator(9)([{"input_ids": [5], "labels": [X]}, {"input_ids": [6, 7], "labels": [X, 7]}])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 9], [6, 7]],
        "attention_mask": [[1, 0], [1, 1]],
        "labels": [[X, X], [X, 7]],
    }
    assert data.Collator(0)([{"input_ids": [5], "labels": 3}])["labels"].tolist() == [3]


FORMS: dict[str, dict[str, Any]] = {
    "prompt-completion": {"prompt": "w{a} w{b}", "completion": "w{c} w{d}"},
    "messages": {
        "messages": [{"role": "user", "content": "w{a} w{b}"}, {"role": "assistant", "content": "w{c} w{d}"}]
    },
    "alpaca": {"instruction": "w{a}", "input": "w{b}", "output": "w{c} w{d}"},
    "text": {"text": "w{a} w{b} w{c} w{d}"},
}


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.long] * (form != "messages")) for form in FORMS]
)
def test_a_causal_model_learns_to_answer_and_to_stop(tiny_llama: Path, tmp_path: Path, form: str) -> None:
    """Four questions with answers of two words: greedy generation gives the answer and the end token after
    it; the base does not.
    """
    asked = [(1, 2, 31, 41), (3, 4, 32, 42), (5, 6, 33, 43), (7, 8, 34, 44)]

    rows = []
    for words in asked:
        text = json.dumps(FORMS[form])
        for letter, word in zip("abcd", words, strict=True):
            text = text.replace(f"{{{letter}}}", str(word))
        rows.append(json.loads(text))
    more = {"max_steps": 60, "learning_rate": 2e-2, "r": 8, "max_length": 32}
    (pack,) = train(settings(tiny_llama, tmp_path, rows, **more, eval_file=write(tmp_path / "e.jsonl", rows)))
    assert [metric["name"] for metric in pack.manifest.metrics] == ["loss"]
    # ln 96 is chance. Its tied embeddings are short, so this model can give no token more than about e^3.3 /
    # (e^3.3 + 96).
    assert pack.manifest.metrics[0]["value"] < np.log(96) / 2
    assert pack.manifest.task.labels is None

    def answers(model: Any) -> list[list[int]]:
        prompts = [torch.tensor([[a + 4, b + 4]]) for a, b, _, _ in asked]
        found = [
            model.generate(p, attention_mask=torch.ones_like(p), max_new_tokens=6, do_sample=False)
            for p in prompts
        ]
        return [ids[0, 2:].tolist() for ids in found]

    expected = [[c + 4, d + 4, E] for _, _, c, d in asked]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    assert not any(answer == right for answer, right in zip(answers(model), expected, strict=True))
    assert answers(attach(model, load(tmp_path / "pack"))) == expected


# --- several adapters, and what is left behind


def test_a_list_of_adapters(tiny_bert: Path, tmp_path: Path) -> None:
    """One file, several packs, each with its own settings; they attach to one model together."""
    config = {
        **classify(tiny_bert, tmp_path),
        "adapters": [{"name": "a"}, {"name": "b", "r": 2, "targets": ["query"]}],
    }
    packs = train(config)
    assert [(pack.name, pack.path) for pack in packs] == [
        ("a", tmp_path / "pack" / "a"),
        ("b", tmp_path / "pack" / "b"),
    ]
    assert {adapter.config.rank for adapter in packs[1].adapters()} == {2}
    model = load_model(get_task(TEXT), tiny_bert)
    for pack in packs:
        assert verify_canary(attach(model, pack), pack) < 1e-5


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"output_dir": "TAKEN"}, OutputExists),
        ({"train_file": "nowhere.csv"}, StorageError),
        ({"task": "fill-mask"}, Unsupported),
        ({"model_name_or_path": "./nowhere"}, StorageError),
    ],
)
def test_what_the_second_adapter_lacks_is_found_before_the_first_is_trained(
    tiny_bert: Path, tmp_path: Path, entry: dict[str, Any], error: type[AdapterpackError]
) -> None:
    """Nothing is trained and nothing written if a later entry cannot be."""
    taken = tmp_path / "taken"
    taken.mkdir()
    second = {key: str(taken) if value == "TAKEN" else value for key, value in entry.items()}
    with pytest.raises(error):
        train(
            {**classify(tiny_bert, tmp_path), "adapters": [{"name": "first"}, {"name": "second", **second}]}
        )
    assert left(tmp_path) == ["rows.jsonl", "taken"]
    assert left(taken) == []


@pytest.mark.parametrize("steps", [1, 4])
def test_divergence_writes_nothing(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """A learning rate of 1e30: after one step tensors are finite and logits are not, after four both are not.
    NonFinite, and no folder.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with pytest.raises(NonFinite):
        train(
            classify(tiny_bert, tmp_path, learning_rate=1e30, max_steps=steps, lr_scheduler_type="constant")
        )
    assert left(tmp_path) == ["rows.jsonl", "scratch"]
    assert left(scratch) == []


def test_ctrl_c_without_checkpoints_leaves_nothing(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT in the middle of a step: neither an output nor anything else is left. With checkpoints:
    test_train_resume.
    """
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # a shell that runs tests in the background lets them ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as interrupt:
            train(
                classify(tiny_bert, tmp_path, max_steps=9, save_strategy="no"),
                progress=lambda step: os.kill(os.getpid(), signal.SIGINT) if step.done == 2 else None,
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert not getattr(interrupt.value, "__notes__", None)
    assert left(tmp_path) == ["rows.jsonl"]


def test_a_pack_of_a_model_in_memory_is_returned(tiny_bert: Path, tmp_path: Path) -> None:
    """``train`` returns packs that need not be read again, and leaves its input and the progress bars of
    others alone.
    """
    enable_progress_bars()
    config = classify(tiny_bert, tmp_path)
    kept = json.dumps(config)
    (pack,) = train(config)
    assert isinstance(pack, Pack)
    assert json.dumps(config) == kept
    assert not are_progress_bars_disabled()


def test_a_real_encoder(minilm: Path, tmp_path: Path) -> None:
    """On a real encoder of 22 M: save, load, attach, canary; logits equal within 1e-6; the base is known by
    its content.
    """
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=4).eval()
    adapt(model, LoRA(r=4, targets=("query", "value"), modules_to_save=("classifier",)), "real")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    pack = save(model, tmp_path / "real")
    assert pack.manifest.base.content == Checkpoint(minilm).content
    assert adapterpack.validate(tmp_path / "real", minilm).valid
    twin = attach(AutoModelForSequenceClassification.from_pretrained(minilm).eval(), load(tmp_path / "real"))
    ids = torch.randint(1000, 20000, (3, 21))
    with torch.no_grad():
        torch.testing.assert_close(twin(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6, rtol=0)
    assert verify_canary(twin, pack) <= 1e-6


@pytest.fixture(scope="module")
def trained_before(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a training that goes on from a pack of rank 16 and alpha 24 at one kind of layer,
    without what the pack says.
    """
    folder = tmp_path_factory.mktemp("before")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"w{n} w{n + 1}"}) + "\n" for n in range(8))
    )
    common = {"model_name_or_path": str(tiny_llama), "train_file": str(folder / "rows.jsonl"), "max_steps": 1}
    train(
        {
            **common,
            "output_dir": str(folder / "first"),
            "r": 16,
            "alpha": 24,
            "dropout": 0.1,
            "targets": ["q_proj"],
        }
    )
    return {**common, "adapter_name_or_path": str(folder / "first")}


@pytest.mark.parametrize(
    "named", [{}, {"lora_r": 16, "lora_alpha": 24}, {"method": "lora", "learning_rate": 1e-3}]
)
def test_training_a_pack_further_keeps_its_rank_and_alpha(
    trained_before: dict[str, Any], tmp_path: Path, named: dict[str, Any]
) -> None:
    """Left out, or named as the pack has them: they are those of the new pack, and what it claims."""
    (pack,) = train({**trained_before, "output_dir": str(tmp_path / "next"), **named})
    assert {key: pack.manifest.config[key] for key in ("r", "alpha", "dropout")} == {
        "r": 16,
        "alpha": 24.0,
        "dropout": 0.1,
    }
    claims = pack.manifest.training["config"]
    assert {key: claims[key] for key in ("r", "alpha", "dropout", "targets")} == {
        "r": 16,
        "alpha": 24.0,
        "dropout": 0.1,
        "targets": ["q_proj"],
    }


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"r": 8}, r"first, r; expected 16, found 8\)"),
        ({"lora_alpha": 32}, r"first, alpha; expected 24\.0, found 32\.0\)"),
        ({"use_rslora": True}, "use_rslora; expected False, found True"),
        ({"method": "ia3"}, "another method.*expected ia3, found lora"),
        ({"rank_pattern": {"q_proj": 4}}, "r; expected 16, found 4"),
    ],
)
def test_training_a_pack_further_with_another_setting_is_refused(
    trained_before: dict[str, Any], tmp_path: Path, named: dict[str, Any], words: str
) -> None:
    """Also where it is the usual one: nothing is trained with another than the configuration names."""
    with pytest.raises(ConfigError, match=words):
        train({**trained_before, "output_dir": str(tmp_path / "next"), **named})


def test_a_printed_configuration_of_a_training_that_goes_on_reads_back(
    trained_before: dict[str, Any], tmp_path: Path
) -> None:
    """It leaves the pack's settings to the pack."""
    from adapterpack.training.loop.continue_training import with_settings_of_the_pack

    (config,), _ = read_config({**trained_before, "output_dir": str(tmp_path / "next"), "lora_r": 16})
    printed = as_mapping(config)
    assert printed["r"] == 16 and not {"alpha", "method"} & printed.keys()
    (again,), _ = read_config(printed)
    assert with_settings_of_the_pack(again) == with_settings_of_the_pack(config)


def test_a_training_that_diverges_packs_nothing_unless_it_is_told_to(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a learning rate far too high: a warning as soon as it shows, then an error instead of a pack; one
    setting overrules it.
    """
    config = classify(tiny_bert, tmp_path, learning_rate=100, max_steps=8)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(NonFinite, match=r"diverged.*step 8.*lower learning_rate.*on_divergence: warn"),
    ):
        train(config)
    assert left(tmp_path) == ["rows.jsonl"]
    (said,) = [line for line in caplog.messages if "far above its start" in line]
    assert said.startswith("step 2:")
    (pack,) = train({**config, "on_divergence": "warn"})
    assert pack.manifest.training["config"]["on_divergence"] == "warn"


@pytest.mark.parametrize(
    ("losses", "warned", "ended"),
    [
        ([1.6] + [900.0] * 30, 2, 21),  # at once, and for long
        ([1.6] * 15 + [9.0] * 40, 19, 38),
        ([0.05] + [2.5, 3.0] * 40, 2, None),  # the first row was an easy one
        ([1.6] * 30 + [900.0] + [1.6] * 30, None, None),  # a batch that is like no other
        ([2.3 - 0.01 * n for n in range(100)], None, None),
        ([-0.2, 0.3] * 50, None, None),  # rewards
        ([1.6] + [700.0, 0.0] * 20, 2, 21),  # half of the batches are right by chance
    ],
)
def test_what_counts_as_a_divergence(
    losses: list[float], warned: int | None, ended: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a warning is first given, and where a run ends."""
    from adapterpack.training.loop.steps import Divergence

    watch, end = Divergence(), None
    for step in range(1, len(losses) + 1):
        try:
            watch.see(losses[:step], step, last=False)
        except NonFinite:
            end = step
            break
    assert [int(line.split()[1].rstrip(":")) for line in caplog.messages] == (
        [] if warned is None else [warned]
    )
    assert end == ended


def test_rows_in_memory_and_a_cell_that_runs_twice(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list, a table and a file of the same rows give the same tensors; with ``overwrite`` the second run takes
    the place of the first pack, and nothing stays in the cache.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows, apart = labelled(1, 24), labelled(2, 8)
    config = {
        "model_name_or_path": str(tiny_bert),
        "task": TEXT,
        "output_dir": str(tmp_path / "pack"),
        "max_steps": 3,
    }
    (first,) = train(config, rows=rows, eval_rows=Dataset.from_list(apart))
    with pytest.raises(OutputExists, match="already exists"):
        train(config, rows=rows)
    (second,) = train(config, rows=Dataset.from_list(rows), eval_rows=apart, overwrite=True)
    assert "<polyline" in page_in_notebook(second)
    assert "<h1>pack</h1>" in page_in_notebook(adapterpack.inspect(second.path))
    assert "text-classification" in page_in_notebook(
        read_config({**config, "train_file": "rows.jsonl"})[0][0]
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (third,) = train({**config, "train_file": str(tmp_path / "rows.jsonl"), "overwrite_output_dir": True})
    assert {name: value.tobytes() for name, value in first.tensors.items()} == {
        name: value.tobytes() for name, value in third.tensors.items()
    }
    assert second.manifest.metrics == first.manifest.metrics != ()
    assert load(tmp_path / "pack").id == third.id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "pack", "rows.jsonl"]
    assert not [*(tmp_path / "cache").rglob("*.parquet")]
    with pytest.raises(ConfigError, match="these rows are no table"):
        train(config, rows=[{"text": "a"}, 3], overwrite=True)  # type: ignore[list-item]
    assert "step" not in capsys.readouterr().err  # a bar is for people


def test_what_is_no_pack_is_not_written_over(tiny_bert: Path, tmp_path: Path) -> None:
    """A folder of something else, and a link to a pack, stay."""
    model = adapt(load_model(get_task("feature-extraction"), tiny_bert), LoRA(r=2))
    save(model, tmp_path / "pack", base=tiny_bert)
    (tmp_path / "link").symlink_to(tmp_path / "pack")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for name in ("link", "notes"):
        with pytest.raises(OutputExists, match="something else than a pack"):
            save(model, tmp_path / name, base=tiny_bert, replace=True)
    assert save(model, tmp_path / "pack", base=tiny_bert, name="new", replace=True).name == "new"
    assert load(tmp_path / "pack").name == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "notes", "pack"]


def test_a_bar_for_people(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal shows steps and losses of :func:`train` without being told to."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    train(
        {
            "model_name_or_path": str(tiny_bert),
            "task": TEXT,
            "output_dir": str(tmp_path / "p"),
            "max_steps": 2,
        },
        rows=labelled(1, 8),
    )
    shown = capsys.readouterr().err
    assert "2/2" in shown and "loss" in shown and "tokens/s" in shown
