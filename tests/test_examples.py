"""Every example runs, on tiny random models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import vision_models
from architecture_proofs import make_base
from architectures import ARCHITECTURES
from word_tokenizer import VOCABULARY, write_tokenizer

import adapterpack
from adapterpack.errors import ConfigError
from adapterpack.training.config.config import read_config
from adapterpack.training.loop.rewards import find_reward

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(("config", "model"), [("tickets.yaml", "tiny_bert"), ("orders.yaml", "tiny_llama")])
def test_training_configs(
    config: str, model: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``adapterpack train examples/X.yaml`` gives a valid pack; paths in it are those of the checkout's
    root.
    """
    monkeypatch.chdir(EXAMPLES.parent)
    folder = request.getfixturevalue(model)
    (pack,) = adapterpack.train(
        EXAMPLES / config,
        [f"model_name_or_path={folder}", f"output_dir={tmp_path / 'pack'}", "max_steps=2", "max_length=48"],
    )
    assert adapterpack.validate(tmp_path / "pack", folder).valid
    assert pack.manifest.training["steps"] == 2
    if config == "orders.yaml":  # what the README shows of it
        assert adapterpack.convert(pack, tmp_path / "orders.gguf", to="gguf", base=folder).notes == ()


CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))
SMALLER = {
    "max_steps": 2,
    "max_length": 64,
    "num_generations": 2,
    "max_completion_length": 4,
    "per_device_train_batch_size": 2,
}
"""What makes a training short, of the settings that a configuration has."""


def _base(task: str, folder: Path, bert: Path, four_bits: bool) -> Path:
    """A tiny random base for a task, with the files that its rows need."""
    if task == "image-text-to-text":
        return vision_models.make_family("llava", folder / "base")
    if task == "image-classification":
        base = make_base(next(one for one in ARCHITECTURES if one.name == "vit"), folder / "base")
        size = json.loads((base / "config.json").read_text())["image_size"]
        settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
        (base / "preprocessor_config.json").write_text(json.dumps(settings))
        return base
    if task in {"text-classification", "token-classification"} and not four_bits:
        return bert
    if task == "text2text-generation":
        base = make_base(next(one for one in ARCHITECTURES if one.name == "t5"), folder / "base")
    else:  # wide enough for blocks of four bits
        torch.manual_seed(3)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            pad_token_id=0,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(base := folder / "base")
    write_tokenizer(base)
    return base


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_for_each_task_and_method(
    path: Path, tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``adapterpack train examples/configs/X.yaml`` gives a valid pack of that method; all of its settings are
    understood, and the command in it is its own.
    """
    monkeypatch.chdir(EXAMPLES.parent)
    text = path.read_text("utf-8")
    assert f"# adapterpack train {path.relative_to(EXAMPLES.parent)}" in text
    (config,), notes = read_config(path)
    assert notes == []
    causal = config.trainer != "sft" or config.load_in_4bit
    base = _base(config.task, tmp_path, tiny_bert, causal)
    short = [f"{key}={value}" for key, value in SMALLER.items() if f"\n{key}:" in text or key == "max_steps"]
    rewards = [find_reward(reward) for reward in re.findall(r"--reward (\S+)", text)]
    (pack,) = adapterpack.train(
        path, [f"model_name_or_path={base}", f"output_dir={tmp_path / 'pack'}", *short], rewards=rewards
    )
    assert pack.manifest.training["steps"] == 2
    assert pack.manifest.method.type == config.method
    assert adapterpack.validate(tmp_path / "pack", base).valid


@pytest.mark.parametrize(
    ("data", "base", "expected"),
    [
        ("tickets.train.jsonl", "tiny_bert", {"task": "text-classification", "trainer": "sft"}),
        ("pairs.train.jsonl", "tiny_bert", {"task": "text-classification", "trainer": "sft"}),
        ("entities.train.jsonl", "tiny_bert", {"task": "token-classification", "trainer": "sft"}),
        ("orders.train.jsonl", "tiny_llama", {"task": "text-generation", "trainer": "sft"}),
        ("chats.train.jsonl", "tiny_llama", {"task": "text-generation", "trainer": "sft"}),
        ("preferences.train.jsonl", "tiny_llama", {"task": "text-generation", "trainer": "dpo"}),
        ("ratings.train.jsonl", "tiny_llama", {"task": "text-generation", "trainer": "kto"}),
        ("prompts.train.jsonl", "tiny_llama", {"task": "text-generation", "trainer": "grpo"}),
    ],
)
def test_init_knows_what_data_is_for(
    data: str, base: str, expected: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The task follows from the columns, and the file that is written says what the call returns."""
    folder = request.getfixturevalue(base)
    settings = adapterpack.init(folder, EXAMPLES / "data" / data, tmp_path / "train.yaml")
    assert {key: settings[key] for key in expected} == expected
    (config,), _ = read_config(tmp_path / "train.yaml")
    assert (config.learning_rate, config.task) == (settings["learning_rate"], settings["task"])
    other = EXAMPLES / "data" / data.replace("train", "test")
    assert config.eval_file == (str(other) if other.is_file() else None)


def test_init_trains_as_it_is(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that nobody prepared becomes a pack."""
    monkeypatch.chdir(tmp_path)
    Path("tickets.csv").write_text("text;label\n" + "Where is it?;delivery\nIt broke;returns\n" * 12)
    settings = adapterpack.init(tiny_bert, "tickets.csv", method="ia3")
    assert (settings["val_set_size"], settings["method"]) == (0.1, "ia3")
    (pack,) = adapterpack.train("train.yaml", ["max_steps=1"])
    assert (pack.manifest.task.labels, pack.path) == (("delivery", "returns"), Path("packs/tickets"))


def test_suggestions_for_what_a_configuration_leaves_open(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is given stays; the rest is as :func:`adapterpack.init` writes it, and the log says why."""
    data = EXAMPLES / "data" / "pairs.train.jsonl"
    config = {
        "model_name_or_path": str(tiny_bert),
        "task": "text-classification",
        "train_file": str(data),
        "output_dir": str(tmp_path / "pack"),
        "r": 2,
        "max_steps": 1,
    }
    with caplog.at_level("INFO", "adapterpack"):
        (pack,) = adapterpack.train(config, suggest=True)
    written = adapterpack.init(tiny_bert, data, tmp_path / "train.yaml")
    used = pack.manifest.training["config"]
    assert (used["r"], used["learning_rate"], used["alpha"]) == (2, written["learning_rate"], 32)
    assert used["num_train_epochs"] == written["num_train_epochs"] == 10
    assert "suggested learning_rate: 0.001 (for lora on a model of width 24)" in caplog.text
    assert "suggested r" not in caplog.text


def test_init_takes_columns_by_other_names(tiny_bert: Path, tmp_path: Path) -> None:
    """Of the file to evaluate on, too; embeddings keep the learning rate that is suggested."""
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text("a;b\n" + "w1 w2;w3\n" * 8)
    data = {"path": str(tmp_path / "train.csv"), "columns": {"anchor": "a", "positive": "b"}}
    settings = adapterpack.init(tiny_bert, data, tmp_path / "train.yaml")
    assert (settings["task"], settings["learning_rate"]) == ("feature-extraction", 1e-3)
    (config,), _ = read_config(tmp_path / "train.yaml")
    assert config.train_file == data
    assert config.eval_file == {**data, "path": str(tmp_path / "test.csv")}


def test_preferences_need_a_base_with_an_end_token(tiny_bert: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    for path in (base / "tokenizer_config.json", base / "special_tokens_map.json"):
        if path.is_file():
            kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}
            path.write_text(json.dumps(kept))
    data = EXAMPLES / "data" / "preferences.train.jsonl"
    with pytest.raises(ConfigError, match="no task of this base reads such data"):
        adapterpack.init(base, data, tmp_path / "train.yaml")
    values = {"model_name_or_path": str(base), "trainer": "reward", "output_dir": str(tmp_path / "pack")}
    with pytest.raises(ConfigError, match=r"no end token.*special_tokens"):
        adapterpack.train({**values, "train_file": str(data)})


def test_init_says_what_tasks_need(tiny_bert: Path, tmp_path: Path) -> None:
    """Data that no task reads: the columns of each task of the base, and nothing is written."""
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no task of this base reads such data") as error:
        adapterpack.init(tiny_bert, tmp_path / "table.csv", tmp_path / "train.yaml")
    assert "token-classification: labels or ner_tags or tags" in str(error.value)
    assert "a, b; a base of type bert" in str(error.value)
    assert not (tmp_path / "train.yaml").exists()


def test_every_example_is_covered_here() -> None:
    """A new file in ``examples/`` needs a test: the configurations above, the method in test_plugins, what other
    kinds of values there are, and a package with a kind of adapter, in test_extensions, the gates in
    hub/test_gates, what is for servers in serving/test_kubernetes, test_containers and test_ray, the
    demo in test_demo, the canary's check in serving/test_conformance, and the scripts that train in test_training_examples; the cookbook in
    guide/test_cookbook.
    """
    known = {
        "check_canary.py",
        "tickets.yaml",
        "orders.yaml",
        "configs",
        "data",
        "demo",
        "ci",
        "containers",
        "cookbook",
        "serving",
        "new_peft_method.py",
        "shadow_peft",
        "training",
        *(f"new_{kind}.py" for kind in ("method", "rule", "node", "task", "codec", "frontend", "target")),
    }
    assert {path.name for path in EXAMPLES.iterdir()} - {"__pycache__"} == known
