"""Folders with torchtune's own form of an adapter, whose tensors and order are its own. ``interop/ecosystems`` has
torchtune itself write them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from adapterpack import convert, inspect, validate
from adapterpack.errors import AdapterpackError, ConfigError, FormatError, Unsupported

pytestmark = pytest.mark.fast

SIZES = {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
SIZES |= {"intermediate_size": 8, "vocab_size": 16}
HEAD = [0, 3, 1, 4, 2, 5]
"""Where torchtune's outputs of a head of 6 numbers are in transformers' order: it rotates the first number with the
second, transformers with the fourth.
"""
QUERIES = [*HEAD, *(6 + at for at in HEAD)]
NAMES = {
    "layers.0.attn.q_proj": ("model.layers.0.self_attn.q_proj", 12, 12),
    "layers.0.attn.k_proj": ("model.layers.0.self_attn.k_proj", 6, 12),
    "layers.0.attn.v_proj": ("model.layers.0.self_attn.v_proj", 6, 12),
    "layers.0.attn.output_proj": ("model.layers.0.self_attn.o_proj", 12, 12),
    "layers.0.mlp.w1": ("model.layers.0.mlp.gate_proj", 8, 12),
    "layers.0.mlp.w2": ("model.layers.0.mlp.down_proj", 12, 8),
    "layers.0.mlp.w3": ("model.layers.0.mlp.up_proj", 8, 12),
    "output": ("lm_head", 16, 12),
}
"""torchtune's module -> transformers', and its widths."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of a family whose heads torchtune orders in its own way, and of one that it leaves as it is."""
    folder = tmp_path_factory.mktemp("bases")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "llama")
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(folder / "qwen2")
    return folder


def wanted(dora: bool) -> dict[str, np.ndarray]:
    """The tensors of an adapter in transformers' order, by torchtune's names."""
    rng, tensors = np.random.default_rng(3), {}
    for name, (_, out, width) in NAMES.items():
        tensors[f"{name}.lora_a.weight"] = rng.normal(size=(2, width)).astype(np.float32)
        tensors[f"{name}.lora_b.weight"] = rng.normal(size=(out, 2)).astype(np.float32)
        if dora:
            tensors[f"{name}.magnitude"] = rng.uniform(1, 2, out).astype(np.float32)
    return tensors


def write(
    folder: Path, tensors: dict[str, np.ndarray], file: str = "adapter_model.pt", **config: Any
) -> Path:
    """A folder as torchtune's checkpointer leaves it."""
    folder.mkdir(exist_ok=True)
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, folder / file)
    said = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA", **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("family", "file"), [("llama", "adapter_model.pt"), ("qwen2", "adapter_3.pt")])
def test_names_and_the_order_of_heads(
    family: str, file: str, dora: bool, bases: Path, tmp_path: Path
) -> None:
    """Every module comes under transformers' name, with the outputs of queries and keys in transformers' order."""
    tensors = wanted(dora)
    stored = dict(tensors)
    for part, order in (("q_proj", QUERIES), ("k_proj", HEAD)) if family == "llama" else ():
        for leaf in ("lora_b.weight", "magnitude"):
            name = f"layers.0.attn.{part}.{leaf}"
            stored |= {name: tensors[name][order]} if name in tensors else {}
    folder = write(tmp_path / "tuned", stored, file)
    done = convert(folder, tmp_path / "pack", base=bases / family)
    assert done.source == "torchtune" and any("nothing of it was run" in note for note in done.notes)
    assert validate(tmp_path / "pack", base=bases / family).findings == ()
    found = {adapter.site.path: adapter for adapter in done.pack.adapters()}
    assert found.keys() == {path for path, *_ in NAMES.values()}
    for name, (path, *_) in NAMES.items():
        assert found[path].config.alpha == 6 and found[path].method.name == ("dora" if dora else "lora")
        np.testing.assert_array_equal(found[path].params["lora_A"], tensors[f"{name}.lora_a.weight"])
        np.testing.assert_array_equal(found[path].params["lora_B"], tensors[f"{name}.lora_b.weight"])
        if dora:
            np.testing.assert_array_equal(
                found[path].params["lora_magnitude_vector"], tensors[f"{name}.magnitude"]
            )
    assert inspect(folder)["format"] == "torchtune" and validate(folder).valid


def test_an_adapter_beside_the_bases_configuration_is_no_base(bases: Path, tmp_path: Path) -> None:
    """torchtune writes both into one folder: without weights of a base there, it is the adapter that is meant,
    and what it lacks is said.
    """
    folder = write(tmp_path / "tuned", wanted(False), "adapter_0.pt")
    (folder / "config.json").write_text((bases / "llama" / "config.json").read_text())
    assert inspect(folder)["format"] == "torchtune"
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match=r"lora_alpha.*adapterpack convert FOLDER --base BASE"):
        inspect(folder)
    (folder / "model.safetensors").write_bytes((bases / "llama" / "model.safetensors").read_bytes())
    assert inspect(folder)["kind"] == "base"


def _without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _with_epochs(folder: Path) -> None:
    (folder / "adapter_model.pt").rename(folder / "adapter_0.pt")
    write(folder, wanted(False), "adapter_1.pt")


def _with_a_fusion_layer(folder: Path) -> None:
    write(folder, {f"decoder.{name}": value for name, value in wanted(False).items()})


def _with_other_heads(folder: Path) -> None:
    odd = {"lora_a": (2, 12), "lora_b": (10, 2)}
    write(
        folder, {f"layers.0.attn.q_proj.{leaf}.weight": np.ones(of, np.float32) for leaf, of in odd.items()}
    )


@pytest.mark.parametrize(
    ("spoil", "error", "told"),
    [
        (_without_config, FormatError, "lora_alpha"),
        (_with_epochs, Unsupported, "several epochs"),
        (_with_a_fusion_layer, Unsupported, "decoder.layers.0"),
        (_with_other_heads, FormatError, "num_attention_heads"),
        (lambda folder: write(folder, wanted(False), lora_alpha="much"), FormatError, "lora_alpha"),
    ],
)
def test_what_cannot_be_told_is_refused(
    spoil: Callable[[Path], object], error: type[AdapterpackError], told: str, bases: Path, tmp_path: Path
) -> None:
    """Each names what is missing, and nothing is written."""
    folder = write(tmp_path / "tuned", wanted(False))
    spoil(folder)
    with pytest.raises(error, match=told):
        convert(folder, tmp_path / "pack", base=bases / "llama")
    assert not (tmp_path / "pack").exists()


def test_the_base_says_the_order(bases: Path, tmp_path: Path) -> None:
    """A conversion needs the base, and one of a family whose order is known."""
    folder = write(tmp_path / "tuned", wanted(False))
    with pytest.raises(ConfigError, match="needs the base"):
        convert(folder, tmp_path / "pack")
    config = bases / "qwen2" / "config.json"
    other = tmp_path / "base"
    other.mkdir()
    for path in (bases / "qwen2").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(config.read_text().replace('"qwen2"', '"cohere"'))
    with pytest.raises(Unsupported, match="cohere"):
        convert(folder, tmp_path / "pack", base=other)
