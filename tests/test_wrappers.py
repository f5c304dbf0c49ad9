"""What stands in a module's place answers as the module does: its attributes can be read and written, and it
is called as before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from adapterpack import Bottleneck, LNTuning, LoRA, LoReFT, TrainableTokens, adapt, detach
from adapterpack.adapter_methods import SiteConfig

pytestmark = pytest.mark.fast


class Experts(nn.Module):
    """Stacked matrices, and a router that weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.router = nn.Parameter(torch.randn(3, 5, 6)), nn.Parameter(torch.randn(3, 6))

    def forward(self, scale: float, hidden: torch.Tensor) -> torch.Tensor:
        weights = (hidden @ self.router.T).softmax(-1)
        return scale * torch.einsum("eoi,bi,be->bo", self.up, hidden, weights)


class Block(nn.Module):
    """A layer that is called with its input second, and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.out_features = 6

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, str]:
        return self.proj(hidden) * mask, "more"


class Layer(NamedTuple):
    """A module, how an adapter gets into it, and a call of it by place and by name."""

    make: Callable[[], nn.Module]
    config: SiteConfig
    x: torch.Tensor
    named: dict[str, Any]
    args: tuple[Any, ...]


X, IDS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([[3, 1, 2]])
IMAGE = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(2))
ONE = ("layer",)
MASK = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
LAYERS = {
    "linear": Layer(lambda: nn.Linear(6, 5), LoRA(r=2, targets=ONE), X, {"input": X}, (X,)),
    "transposed": Layer(lambda: Conv1D(5, 6), LoRA(r=2, targets=ONE), X, {"x": X}, (X,)),
    "convolution": Layer(
        lambda: nn.Conv1d(6, 5, 2), LoRA(r=2, targets=ONE), IMAGE, {"input": IMAGE}, (IMAGE,)
    ),
    "embedding": Layer(lambda: nn.Embedding(7, 6), LoRA(r=2, targets=ONE), IDS, {"input": IDS}, (IDS,)),
    "table": Layer(
        lambda: nn.Embedding(7, 6),
        TrainableTokens(token_indices=(1, 3), targets=ONE),
        IDS,
        {"input": IDS},
        (IDS,),
    ),
    "layer norm": Layer(lambda: nn.LayerNorm(6), LNTuning(targets=ONE), X, {"input": X}, (X,)),
    "norm of a model": Layer(lambda: LlamaRMSNorm(6), LNTuning(targets=ONE), X, {"hidden_states": X}, (X,)),
    "parameter": Layer(
        Experts, LoRA(r=2, targets=("layer.up", "layer.router")), X, {"hidden": X, "scale": 2.0}, (2.0, X)
    ),
    "block": Layer(Block, LoReFT(r=2, targets=ONE), X, {"mask": MASK, "hidden": X}, (X, MASK)),
    "trained whole": Layer(
        Block, LoRA(r=1, targets=("other",), modules_to_save=ONE), X, {"mask": MASK, "hidden": X}, (X, MASK)
    ),
}
every_layer = pytest.mark.parametrize("label", LAYERS)


def adapted(label: str) -> tuple[nn.Module, nn.Module]:
    """The model of one layer, and another, with an adapter in it; and the layer itself."""
    torch.manual_seed(3)
    layer = LAYERS[label].make()
    model = adapt(nn.ModuleDict({"layer": layer, "other": nn.Linear(3, 3)}).eval(), LAYERS[label].config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    return model, layer


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@every_layer
@torch.no_grad()
def test_a_layer_is_called_by_name_as_by_place(label: str) -> None:
    """The same numbers, with the adapter and without; what else the call has reaches the layer."""
    model, layer = adapted(label)
    _, _, _, named, args = LAYERS[label]
    found = first(model["layer"](**named))
    assert torch.equal(found, first(model["layer"](*args)))
    assert not torch.allclose(found, first(layer(*args))), "the adapter changes nothing"
    assert torch.equal(first(detach(model)["layer"](**named)), first(layer(*args)))


@every_layer
def test_no_attribute_of_a_layer_is_hidden(label: str) -> None:
    """Whatever public name a wrapper uses for itself is the layer's where the layer has it, to read and to
    write; forward alone is not.
    """
    model, layer = adapted(label)
    outside = model["layer"]
    mine = {
        name
        for name in (*dir(type(outside)), *outside.__dict__, *outside._modules)
        if not name.startswith("_")
    }
    names = mine | {
        "base",
        "site",
        "path",
        "names",
        "active",
        "methods",
        "labels",
        "adapters",
        "params",
        "shared",
        "scale",
    }
    for name in sorted(names - set(dir(nn.Module())) - set(dir(layer))):
        setattr(layer, name, value := object())
        assert getattr(outside, name) is value, name
        setattr(outside, name, value := object())
        assert getattr(outside, name) is getattr(layer, name) is value, name
    with torch.no_grad():
        assert torch.equal(
            first(outside(*LAYERS[label].args)), first(adapted(label)[0]["layer"](*LAYERS[label].args))
        )


@every_layer
def test_an_attribute_that_the_layer_lacks_is_missing(label: str) -> None:
    model, _ = adapted(label)
    assert not hasattr(model["layer"], "nothing_of_the_kind")
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = model["layer"].nothing_of_the_kind


@every_layer
def test_names_in_a_state_dict_and_copies_stay_as_they_are(label: str) -> None:
    """The layer's tensors stand under ``base``, also by attribute; a deep copy computes the same and shares
    nothing.
    """
    model, layer = adapted(label)
    stored = model.state_dict()
    inner = f"layer.{'base.' * (2 if label == 'parameter' else 1)}"
    assert {name.removeprefix(inner) for name in stored if name.startswith(inner)} == set(layer.state_dict())
    assert all(torch.equal(model.get_parameter(name), stored[name]) for name, _ in model.named_parameters())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = first(model["layer"](*LAYERS[label].args))
        assert torch.equal(first(twin["layer"](*LAYERS[label].args)), expected)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(first(model["layer"](*LAYERS[label].args)), expected)
    model.load_state_dict(stored)


def test_a_block_finds_its_input_by_name_and_not_by_order() -> None:
    """An adapter that reads the block's input is given the first parameter of its forward, whichever keyword
    came first.
    """
    torch.manual_seed(3)
    model = adapt(
        nn.ModuleDict({"layer": Block()}).eval(), Bottleneck(reduction=2, source="input", targets=ONE)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
        mask = torch.ones(4, 6)
        assert torch.equal(model["layer"](mask=mask, hidden=X)[0], model["layer"](X, mask)[0])
