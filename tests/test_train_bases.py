"""Bases that cannot be trained on: without a tokenizer, damaged, or with code of their own; each is named
before anything is trained.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from click.testing import CliRunner
from training_families import seeing

from adapterpack import train
from adapterpack.cli.main import main
from adapterpack.errors import AdapterpackError, FormatError, StorageError, Unsupported
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

TEXT = "text-classification"


def classify(base: Path, folder: Path) -> dict[str, Any]:
    """A short run on rows with two labels, written to ``folder/pack``."""
    rows = [{"text": f"w{number}", "label": ("no", "yes")[number % 2]} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(base),
        "train_file": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "pack"),
        "task": TEXT,
        "max_steps": 1,
    }


def test_a_base_without_a_tokenizer(tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Named before anything is trained, with what to do; of BERT, too, whose class would make a tokenizer
    that knows no word.
    """
    for base in (tiny_bert, tiny_llama):
        folder = tmp_path / base.name
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("tokenizer*", "special*", "vocab*"))
        config = tmp_path / "train.yaml"
        config.write_text(json.dumps(classify(folder, tmp_path)))
        done = CliRunner().invoke(main, ["train", str(config)])
        assert done.exit_code == 1
        assert re.search(r"the base has no tokenizer \(at .*save_pretrained", done.stderr)
        assert "bug" not in done.stderr
        with pytest.raises(StorageError, match="no tokenizer"):
            train(classify(folder, tmp_path))
        if base == tiny_bert:
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
            with pytest.raises(StorageError, match="no tokenizer"):
                train(classify(folder, tmp_path))
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("layer", [-2, [-2, -1]], ids=str)
def test_which_layer_of_a_vision_tower_is_read_is_no_count_of_layers(
    layer: int | list[int], tmp_path: Path
) -> None:
    """Every published LLaVA reads the last layer but one."""
    (architecture,) = (one for one in ARCHITECTURES if one.name == "llava")
    config = architecture.config(transformers)
    config.vision_feature_layer = layer
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    loaded = load_model(get_task("image-text-to-text"), tmp_path / "base").eval()
    batch = {key: value for key, value in seeing().items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("name", "content", "error", "text"),
    [
        ("tokenizer.json", "{", FormatError, "not a tokenizer"),
        ("tokenizer.json", "[]", FormatError, "not a tokenizer"),
        ("tokenizer.json", "[" * 100_000, FormatError, "not a tokenizer"),
        ("tokenizer_config.json", "{", FormatError, "not valid JSON"),
        ("config.json", "{", FormatError, "cannot be loaded|not valid JSON"),
        ("config.json", "[]", FormatError, "cannot be loaded"),
        (
            "config.json",
            '{"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModel": "odd.Model"}}',
            Unsupported,
            "never run",
        ),
    ],
)
def test_a_damaged_base_is_named(
    name: str,
    content: str,
    error: type[AdapterpackError],
    text: str,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What transformers makes of it is an error of ours; code that a base brings is neither run nor asked
    about.
    """
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    (folder / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Odd: pass\n")
    (folder / name).write_text(content)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(error, match=text):
        train(classify(folder, tmp_path))
    if name == "config.json":
        with pytest.raises(error, match=text):
            load_model(get_task(TEXT), folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", ["[]", "7", '{"architectures": 5}', '{"architectures": [5]}', '{"architectures": ["Odd", 5]}']
)
def test_configurations_of_no_form(content: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Whatever command reads them, what is wrong is said in a sentence, or does not matter to it."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (folder / "config.json").write_text(content)
    out = tmp_path / "bundle"
    for line in (
        f"export {folder} -o {out}",
        f"inspect {folder}",
        f"export {folder} --task text-generation -o {out}",
    ):
        done = CliRunner().invoke(main, line.split())
        assert "bug" not in done.stderr
        assert done.exit_code == (0 if line.startswith("inspect") and content.startswith("{") else 1)
