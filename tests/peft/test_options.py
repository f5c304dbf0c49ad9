"""What a folder of PEFT's may hold that is not known here, or not read: options of a later version, other
kinds of layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from adapterpack import attach, convert, load, merge, validate
from adapterpack.adapter_methods import Method, methods
from adapterpack.errors import BaseMismatch, Unsupported
from adapterpack.io import safetensors
from adapterpack.manifest.integrity import seal
from adapterpack.peft.options import unknown_options

CONFIG = "adapter_config.json"


class Seeing(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = nn.Conv2d(6, 12, 3), nn.Linear(12, 4)


def written(folder: Path, config: Any, **options: Any) -> Path:
    """The folder that PEFT writes of an adapter of that model."""
    peft.get_peft_model(Seeing(), config(**options)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("value", [False, None, 0, "", [], {}], ids=repr)
def test_an_unknown_option_that_is_off_is_named(value: Any, tmp_path: Path) -> None:
    """A newer PEFT's folder is read, but not in silence: an option that is on by default would change the
    result by being off.
    """
    folder = written(tmp_path / "theirs", peft.LoraConfig, target_modules=["lin"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = load(folder).tensors
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "use_telepathy": value}))
    with pytest.warns(UserWarning, match="use_telepathy"):
        assert load(folder).tensors.keys() == tensors.keys()
    report = validate(folder)
    (finding,) = [finding for finding in report.findings if finding.rule == "AP604"]
    assert (finding.severity, finding.file, finding.pointer) == ("warning", CONFIG, "/use_telepathy")
    assert report.valid
    assert "use_telepathy" in convert(folder, tmp_path / "pack", to="pack").notes[0]


@pytest.mark.parametrize(
    "method", [method for method in methods().values() if method.peft], ids=lambda method: method.name
)
def test_every_option_of_this_peft_is_known(method: Method) -> None:
    """No option that PEFT itself writes for a method is one that would be named as unknown: its folders load
    without a word.
    """
    assert method.peft is not None
    # some write only what PEFT wrote
    configs = itertools.chain(method.examples, (method.peft.from_config({}) for _ in range(1)))
    ours = next(
        config for config in (method.peft.to_config({"": one}) for one in configs) if config is not None
    )
    beside = {
        other.peft.overrides["secondary"].key
        for other in methods().values()
        if other.peft and "secondary" in other.peft.overrides
    }
    unknown: list[str] = []
    for option in {
        field.name for field in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft.peft_type])
    }.difference(beside, method.peft.known_keys):
        with contextlib.suppress(Unsupported):  # known, and this is no value of it
            unknown += unknown_options(
                {option: None}, ours, [layer.config for layer in method.peft.layers.values()], Path(CONFIG)
            )
    assert unknown == []


@torch.no_grad()
def test_repeated_blocks_are_refused_and_the_remedy_gives_the_same_model(tmp_path: Path) -> None:
    """A folder of PEFT and a pack of an earlier version are refused in the same words; without the option, on
    a checkpoint with the blocks written out, the folder computes what PEFT's model computed.
    """
    torch.manual_seed(3)
    order, ids = [0, 1, 1, 2], torch.tensor([[5, 6, 7, 8]])
    base = {layers: transformers.LlamaForCausalLM(tiny_llama(layers)) for layers in (3, 4)}
    for name, value in base[4].state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(order[int(parts[2])])
        value.copy_(base[3].state_dict()[".".join(parts)])
    config = peft.LoraConfig(
        target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [1, 3]], init_lora_weights=False
    )
    theirs = peft.get_peft_model(base[3], config).eval()
    theirs.save_pretrained(folder := tmp_path / "theirs")
    refused = r"repeats blocks of its base.*mergekit's passthrough.*take layer_replication out of"
    with pytest.raises(Unsupported, match=refused):
        load(folder)
    assert not validate(folder).valid
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "layer_replication": None}))
    pack = load(folder)
    model = attach(base[4].eval(), pack)
    np.testing.assert_allclose(model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)
    pack.write(tmp_path / "old")
    manifest = json.loads((file := tmp_path / "old" / "adapterpack.json").read_text())
    manifest["config"]["repeated_layers"] = [0, 2, 1, 3]
    file.write_bytes(seal(manifest))
    with pytest.raises(Unsupported, match=refused):
        load(tmp_path / "old")
    assert "repeats blocks" in str(validate(tmp_path / "old").findings[0])


def tiny_llama(layers: int) -> transformers.LlamaConfig:
    """Llama with so many blocks."""
    return transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=28,
    )


def test_a_kind_of_layer_that_is_not_read_is_named(tmp_path: Path) -> None:
    """Tensors with more axes than the method has at the layers that are read: no malformed file, but another
    kind of layer.
    """
    with pytest.raises(
        Unsupported,
        match=r"for a kind of layer at which its form of .* is not read.*the library that made it",
    ):
        load(written(tmp_path / "theirs", peft.LNTuningConfig, target_modules=["conv"]))


def test_another_base_is_called_that(tmp_path: Path) -> None:
    """The kinds of layers whose tensors look like those of a linear one are no reason to take a wrong base
    for a right one.
    """
    shapes = {"conv.weight": (12, 6, 3, 3), "conv.bias": (12,), "lin.weight": (4, 11), "lin.bias": (4,)}
    (tmp_path / "base").mkdir()
    safetensors.write(
        tmp_path / "base" / "model.safetensors",
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()},
    )
    with pytest.raises(BaseMismatch, match=r"another shape.*the model that the adapter was trained on"):
        merge(
            tmp_path / "base",
            [written(tmp_path / "theirs", peft.LoraConfig, r=2, target_modules=["lin"])],
            tmp_path / "merged",
        )
