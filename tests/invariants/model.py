"""Proves a method in a torch model: what trains, what stays, and that the mathematics is the same there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from adapterpack.adapter_methods import fold
from adapterpack.testing import AdaptedCase, Case, digests, is_float, require, to_tensor

from .layer_fixtures import stand_of


def inputs_of(case: Case) -> Any:
    """What goes into :func:`module_of`: the case's inputs in float32, or the ids that stand for them where
    positions follow from ids.
    """
    if case.config.acts is not None:
        return to_tensor(_ids(case))
    x = to_tensor(stand_of(case).x(case))
    return x.float() if x.is_floating_point() else x


def _ids(case: Case) -> np.ndarray:
    """The same ids ``0, 1, ...`` in every row."""
    rows, length = case.x.shape[:2]
    return np.tile(np.arange(length), (rows, 1))


def _where(case: Case) -> np.ndarray | bool:
    """Where the case's adapter acts, ``[rows, length, 1]``, or everywhere."""
    if case.config.acts is None:
        return True
    ids = _ids(case)
    real = np.ones_like(ids, bool)
    mask: np.ndarray = case.config.acts.mask(ids, real, real, None)[..., None]
    return mask


def module_of(case: Case) -> Any:
    """A float32 torch module with the case's layer at its path; it takes ids where the adapter's positions
    follow from them.
    """
    import torch
    from torch import nn

    class Module(nn.Module):
        """One layer, three names deep."""

        def __init__(self) -> None:
            super().__init__()
            stand = stand_of(case)
            proj = stand.make(nn, case)
            with torch.no_grad():
                proj.weight.copy_(to_tensor(stand.stored(case.weight)))
                if case.bias is not None:
                    proj.bias.copy_(to_tensor(case.bias))
            self.block = nn.Sequential(nn.ModuleDict({"proj": proj}))

        def forward(self, x: Any) -> Any:
            """The layer's output."""
            return self.block[0]["proj"](x)

    table = to_tensor(case.x).float()

    class OfIds(Module):
        """The same on the rows of a table."""

        def forward(self, input_ids: Any) -> Any:
            """The layer's output for the inputs that the ids stand for."""
            return super().forward(table[torch.arange(len(table))[:, None], input_ids])

    return Module() if case.config.acts is None else OfIds()


def _model(case: Case) -> Any:
    """The module, adapted; the adapter's trained values are the case's."""
    from adapterpack.torch_adapters.adapt import adapt

    model = adapt(module_of(case), dataclasses.replace(case.config, targets="proj", dropout=0.0), "a")
    _set(model, "a", case.trained(np.float32))
    return model


def _set(model: Any, adapter: str, values: dict[str, np.ndarray]) -> None:
    """Gives an adapter these parameters."""
    import torch

    from adapterpack.torch_adapters.layers.layer import Adapted

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Adapted):
                for name, value in {
                    **dict(module._part(adapter).named_parameters()),
                    **module._shared(adapter),
                }.items():
                    value.copy_(torch.as_tensor(values[name]))


def in_single(case: Case, everywhere: bool = False) -> tuple[np.ndarray, float]:
    """``run(x)`` from float32 values, computed in float64, and the size of its sums: what a float32
    computation is compared with.

    Where the adapter does not act it is ``base(x)``, unless it is to act ``everywhere``, as folded.
    """
    wide = {name: v.astype(np.float64) if is_float(v) else v for name, v in case.trained(np.float32).items()}
    weight = case.weight.astype(np.float32).astype(np.float64)
    bias = None if case.bias is None else case.bias.astype(np.float32).astype(np.float64)
    stand, x = stand_of(case), stand_of(case).x(case)
    layer = AdaptedCase(case, wide, weight, bias)
    there = layer.run(x) if stand.node is None else stand.output(*layer.fold(), x)
    expected: np.ndarray = np.where(everywhere or _where(case), there, stand.output(weight, bias, x))
    return expected, float(np.abs(expected).max() + stand.output(np.abs(weight), None, np.abs(x)).max())


def active_together(case: Case) -> None:
    """Two adapters active in the torch layer give, in float32, what ``fold2(fold1(W))`` gives: within 4e-5 of
    the largest entry and of ``|W| |x|``, a rounding for each.
    """
    import torch

    from adapterpack.torch_adapters.adapt import adapt
    from adapterpack.torch_adapters.layers.active import active

    config = dataclasses.replace(case.config, targets="proj", dropout=0.0)
    model, weight, bias = module_of(case), case.weight.astype(np.float32), case.bias
    folded = (weight.astype(np.float64), None if bias is None else bias.astype(np.float32).astype(np.float64))
    original = folded
    for name, factor in (("a", 1.0), ("b", 0.5)):
        adapt(model, config, name)
        values = {
            key: v * np.float32(factor) if key in case.trains else v
            for key, v in case.trained(np.float32).items()
        }
        _set(model, name, values)
        wide = {key: v.astype(np.float64) if is_float(v) else v for key, v in values.items()}
        site = AdaptedCase(case, wide, *original).site
        folded = fold(case.method, case.config, wide, site, *folded)
    with torch.no_grad():
        found = active(model, ["a", "b"])(inputs_of(case)).numpy()
    stand, x = stand_of(case), stand_of(case).x(case)
    expected, base = stand.output(*folded, x), stand.output(*original, x)
    expected = np.where(_where(case), expected, base)
    error, size = (
        float(np.abs(found - expected).max()),
        float(np.abs(expected).max() + (np.abs(x) @ np.abs(weight).T).max()),
    )
    require(error <= 4e-5 * size, f"two adapters are off by {error:.2g}, of sums of size {size:.2g}")


def _gradients(model: Any, x: Any, through: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    import torch

    model.zero_grad()
    loss: torch.Tensor = ((through(x) - 1) ** 2).mean()
    loss.backward()
    return {
        name: value.grad.numpy().copy() for name, value in model.named_parameters() if value.grad is not None
    }


def only_the_adapter_trains(case: Case) -> None:
    """Exactly the parameters that the method trains want gradients; a step of SGD leaves the bytes of the
    base as they were.
    """
    import torch

    model = _model(case)
    wanting = [value for value in model.parameters() if value.requires_grad]
    shapes = sorted(
        tuple(value.shape) for name, value in {**case.shared(), **case.own()}.items() if name in case.trains
    )
    require(
        sorted(tuple(value.shape) for value in wanting) == shapes,
        "other parameters want gradients than the method trains",
    )
    layer = model.block[0]["proj"].base
    before = digests({name: value.detach().numpy() for name, value in layer.named_parameters()})
    _gradients(model, inputs_of(case), model)
    torch.optim.SGD(wanting, lr=0.1).step()
    require(
        digests({name: value.detach().numpy() for name, value in layer.named_parameters()}) == before,
        "training changed the base",
    )


def disabled_is_the_base(case: Case) -> None:
    """With the adapter off after it was on, and again after it was taken out, the output is the base's, bit
    for bit.
    """
    import torch

    from adapterpack.torch_adapters.adapt import detach
    from adapterpack.torch_adapters.layers.active import active

    model, x = _model(case), inputs_of(case)
    expected = module_of(case)(x)
    model(x)
    require(torch.equal(active(model, None)(x), expected), "an adapter that is off changes the output")
    require(torch.equal(detach(model)(x), expected), "an adapter that was taken out changes the output")


def layer_agrees(case: Case) -> None:
    """The torch layer, kernels and all, gives ``run(x)`` in float32: within 2e-5 of the largest entry and of
    ``|W| |x|``.
    """
    import torch

    with torch.no_grad():
        found = _model(case)(inputs_of(case)).numpy()
    expected, size = in_single(case)
    error = float(np.abs(found - expected).max())
    require(error <= 2e-5 * size, f"the layer is off by {error:.2g}, of sums of size {size:.2g}")


def checkpointed_gradients(case: Case) -> None:
    """Gradients under activation checkpointing, where the forward pass runs twice, are those without: bit for
    bit.
    """
    from torch.utils.checkpoint import checkpoint

    model, x = _model(case), inputs_of(case)
    plain = _gradients(model, x, model)
    again = _gradients(model, x, lambda value: checkpoint(model, value, use_reentrant=False))
    require(plain.keys() == again.keys() and len(plain) > 0, "other parameters have gradients")
    require(digests(plain) == digests(again), "checkpointing changes a gradient")


def compiled_gradients(case: Case) -> None:
    """Gradients under ``torch.compile`` (traced whole, forward and backward) are those without, within 1e-5
    of the largest.
    """
    import torch

    model, x = _model(case), inputs_of(case)
    plain = _gradients(model, x, model)
    torch._dynamo.reset()
    again = _gradients(model, x, torch.compile(model, backend="aot_eager", fullgraph=True))
    require(plain.keys() == again.keys() and len(plain) > 0, "other parameters have gradients")
    for name, value in plain.items():
        error = float(np.abs(value - again[name.removeprefix("_orig_mod.")]).max())
        require(error <= 1e-5 * (np.abs(value).max() + 1), f"the gradient of {name} differs when compiled")
