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
from torch import nn

from adapterpack import convert, load, merge, validate
from adapterpack.adapter_methods import Method, methods
from adapterpack.errors import BaseMismatch, Unsupported
from adapterpack.io import safetensors
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
    beside = {other.peft.secondary.key for other in methods().values() if other.peft and other.peft.secondary}
    unknown: list[str] = []
    for option in {
        field.name for field in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft.peft_type])
    }.difference(beside, method.peft.understood):
        with contextlib.suppress(Unsupported):  # known, and this is no value of it
            unknown += unknown_options(
                {option: None}, ours, [layer.config for layer in method.peft.layers.values()], Path(CONFIG)
            )
    assert unknown == []


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
