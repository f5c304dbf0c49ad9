"""The relatives of LoRA beside PEFT itself: it loads ours, we load its, and both are the dense float64 formula written here."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from torch import nn

import adapterpack
from adapterpack.methods import DoRA, complete, fold, get
from adapterpack.pack import peft_layout
from adapterpack.pack.pack import Pack

FP32 = 2e-5
"""Absolute: two float32 layers with outputs of about 1 to 10; sums of 12 products, and a row norm, round at some 1e-6."""
Weights = Mapping[str, np.ndarray]
Dense = Callable[[Any, Weights, np.ndarray], np.ndarray]
"""config at the site, its tensors (float64), W ``[out, in]`` -> W'"""


class Row(NamedTuple):
    """One configuration, on both sides; ``widths`` are those of three layers in a row."""

    ours: Any
    theirs: Any
    dense: Dense
    widths: tuple[int, int, int, int] = (12, 7, 12, 5)


def dora(cfg: Any, t: Weights, W: np.ndarray) -> np.ndarray:
    turned = W + cfg.scale * t["lora_B"] @ t["lora_A"]
    return t["lora_magnitude_vector"][:, None] * turned / np.linalg.norm(turned, axis=1, keepdims=True)


TABLE: dict[str, Row] = {
    "DoRA": Row(DoRA(r=3, alpha=5), peft.LoraConfig(r=3, lora_alpha=5, use_dora=True), dora),
    "DoRA, rsLoRA, a rank of its own": Row(
        DoRA(r=3, alpha=5, use_rslora=True, rank_pattern={"b": 2}),
        peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=True, rank_pattern={"b": 2}), dora),
}
ROWS = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)


class Three(nn.Module):
    """Three linear layers, the second without a bias."""

    def __init__(self, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        torch.manual_seed(3)
        first, second, third, fourth = widths
        self.a, self.b, self.c = nn.Linear(first, second), nn.Linear(second, third, bias=False), nn.Linear(third, fourth)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(input_ids)))))


def outputs(model: nn.Module) -> np.ndarray:
    """What the model makes of two fixed rows."""
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    x = torch.randn(2, 3, first.in_features, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return model.eval()(x.to(first.weight.dtype)).double().numpy()


def randomise(model: nn.Module) -> None:
    """Every trained parameter moved by noise, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def densified(row: Row, pack: Pack) -> nn.Module:
    """The base in float64 with the formula written into its weights."""
    model = Three(row.widths).double()
    with torch.no_grad():
        for adapter in pack.adapters():
            layer = model.get_submodule(adapter.site.path)
            tensors = {name: np.asarray(value, np.float64) if value.dtype.kind == "f" else value for name, value in adapter.params.items()}
            layer.weight.copy_(torch.tensor(row.dense(adapter.config, tensors, layer.weight.numpy())))
    return model


def folded(row: Row, pack: Pack) -> dict[str, np.ndarray]:
    """Our merged weights."""
    model, result = Three(row.widths), {}
    for adapter in pack.adapters():
        layer = model.get_submodule(adapter.site.path)
        weight, bias = layer.weight.detach().numpy(), None if layer.bias is None else layer.bias.detach().numpy()
        site = adapter.site
        if pack.method.traits.reads_weight:
            site = dataclasses.replace(site, weight=weight, base_bias=bias)
        params = complete(pack.method, adapter.config, adapter.wide, site)
        result[f"{site.path}.weight"], new = fold(pack.method, adapter.config, params, site, weight, bias)
        if new is not None:
            result[f"{site.path}.bias"] = new
    return result


def require_same(row: Row, pack: Pack, ours: nn.Module, theirs: peft.PeftModel) -> None:
    """Both models, both merges and the dense formula agree, and the adapter does something."""
    dense = densified(row, pack)
    expected = outputs(dense)
    assert np.abs(expected - outputs(Three(row.widths).double())).max() > 0.05
    np.testing.assert_allclose(outputs(ours), expected, rtol=0, atol=FP32)
    np.testing.assert_allclose(outputs(theirs), expected, rtol=0, atol=FP32)
    merged = theirs.merge_and_unload().state_dict()
    for name, value in folded(row, pack).items():
        np.testing.assert_allclose(value, merged[name].numpy(), rtol=0, atol=FP32, err_msg=name)
        np.testing.assert_allclose(value, dense.state_dict()[name].numpy(), rtol=0, atol=FP32, err_msg=name)


@ROWS
def test_peft_loads_our_pack(row: Row, tmp_path: Path) -> None:
    """PEFT(base, our folder) == ours == dense float64, forward and merged, within 2e-5; no key is missing or left over."""
    ours = adapterpack.adapt(Three(row.widths), row.ours, "ours", seed=6)
    randomise(ours)
    pack = adapterpack.save(ours, tmp_path / "ours")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(Three(row.widths), tmp_path / "ours")
    assert not [str(warning.message) for warning in said if "key" in str(warning.message)]
    require_same(row, pack, ours, theirs)


@ROWS
def test_we_load_what_peft_wrote(row: Row, tmp_path: Path) -> None:
    """The other way: PEFT's folder, read here, gives PEFT's outputs and merged weights."""
    config = copy.deepcopy(row.theirs)
    config.target_modules = {"a", "b", "c"}
    theirs = peft.get_peft_model(Three(row.widths), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    pack = peft_layout.read(tmp_path / "theirs")
    assert pack.method is adapterpack.methods.registry.method_of(row.ours)
    ours = adapterpack.attach(Three(row.widths), pack, check_base=False)
    require_same(row, pack, ours, theirs)


@ROWS
def test_a_pack_is_hardly_larger_than_what_was_trained(row: Row, tmp_path: Path) -> None:
    """Stored tensors take at most 1.05 times the bytes of the trained parameters, at widths as real models have them."""
    site = adapterpack.methods.Site("layer", 1024, 1024)
    shapes = get(adapterpack.methods.registry.method_of(row.ours).name).shapes(type(row.ours)(), site)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    frozen = adapterpack.methods.registry.method_of(row.ours).traits.frozen
    assert sum(sizes.values()) <= 1.05 * sum(size for name, size in sizes.items() if name not in frozen)


def test_doras_gradient_is_pefts(tmp_path: Path) -> None:
    """The norm is a constant to the gradient on both sides: gradients of A, B and m agree within 1e-5, from the same tensors."""
    row = TABLE["DoRA"]
    theirs = peft.get_peft_model(Three(row.widths), peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["a", "b", "c"]))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = adapterpack.attach(Three(row.widths), peft_layout.read(tmp_path / "theirs"), check_base=False)
    x = torch.randn(4, row.widths[0], generator=torch.Generator().manual_seed(7))
    for layer in (ours.a, ours.b, ours.c):
        layer.trainable(layer.names[0])
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for path in "abc":
        own = dict(getattr(ours, path).part(getattr(ours, path).names[0]).named_parameters())
        layer = theirs.base_model.model.get_submodule(path)
        for name, other in (("lora_A", layer.lora_A["default"].weight), ("lora_B", layer.lora_B["default"].weight),
                            ("lora_magnitude_vector", layer.lora_magnitude_vector["default"].weight)):
            np.testing.assert_allclose(own[name].grad.numpy(), other.grad.numpy(), rtol=1e-4, atol=1e-5, err_msg=f"{path}.{name}")
