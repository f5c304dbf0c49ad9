"""Proves a method at every kind of layer that it declares, other than ``linear``."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapterpack.adapter_methods import Site, complete, fold, from_matrix, is_stacked, to_matrix
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build
from adapterpack.pack.validate.validation import load
from adapterpack.peft import layout
from adapterpack.testing import Case, digests, is_float, require, to_tensor

NAME = "block.0.proj"


class Probe(NamedTuple):
    """A layer of a kind, small: ``make`` builds a model with it at :data:`NAME`; ``x`` is what goes in,
    float64 or ids.

    For a method it is 7 x 12, as the first of the linear layers is; of groups 6 x 12.
    """

    make: Callable[[], Any]
    x: np.ndarray


def _floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape)


def _held(make: Callable[[Any], Any]) -> Callable[[], Any]:
    """A model of one layer; ``make`` is given torch's layers. With a ``table`` its inputs are ids."""

    def model() -> Any:
        import torch
        from torch import nn

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = nn.Sequential(nn.ModuleDict({"proj": make(nn)}))
                self.table: Any = None

            def forward(self, input_ids: Any) -> Any:
                x = (
                    input_ids
                    if self.table is None
                    else self.table[torch.arange(len(self.table))[:, None], input_ids]
                )
                return self.block[0]["proj"](x)

        return Model()

    return model


def _bare(*shape: int) -> Callable[[], Any]:
    """A model that multiplies by a parameter, and sums over a stack of them."""

    def model() -> Any:
        import torch
        from torch import nn

        class Product(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Parameter(torch.empty(shape))
                self.is_transposed = shape[-2:] == (12, 7)

            def forward(self, x: Any) -> Any:
                return sum(
                    x @ (one if self.is_transposed else one.T) * number
                    for number, one in enumerate(self.proj if self.proj.ndim == 3 else [self.proj], 1)
                )

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = nn.Sequential(Product())

            def forward(self, x: Any) -> Any:
                return self.block(x)

        return Model()

    return model


def _gpt2(nn: Any) -> Any:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(7, 12)


PROBES: dict[str, Probe] = {
    "linear": Probe(_held(lambda nn: nn.Linear(12, 7)), _floats(3, 5, 12)),
    "transposed": Probe(_held(_gpt2), _floats(3, 5, 12)),
    "embedding": Probe(
        _held(lambda nn: nn.Embedding(12, 7)), np.random.default_rng(3).integers(0, 12, (3, 5))
    ),
    "table": Probe(_held(lambda nn: nn.Embedding(7, 12)), np.random.default_rng(3).integers(0, 7, (3, 5))),
    "conv": Probe(_held(lambda nn: nn.Conv2d(3, 7, 2, padding=1)), _floats(3, 3, 5, 5)),
    "grouped_conv": Probe(_held(lambda nn: nn.Conv1d(8, 6, 3, groups=2, bias=False)), _floats(3, 8, 5)),
    "parameter": Probe(_bare(7, 12), _floats(3, 5, 12)),
    "experts": Probe(_bare(3, 7, 12), _floats(3, 5, 12)),
    "turned_experts": Probe(_bare(3, 12, 7), _floats(3, 5, 12)),
}
"""Kind of layer -> a layer of it. Who adds a kind adds a probe."""


def every_kind_agrees(case: Case) -> None:
    """At each kind that ``traits.layers`` names, ``layer(x)`` adapted is ``layer(x)`` with ``fold(W, b)`` as
    its weight, within 1e-9 in float64; fresh it is the base by trait, off and taken out always, bit for bit;
    gradients reach what is trained; a pack of it goes round; and PEFT, where the pack's folder is its, gives
    the same from it in float32, merged too, within 1e-4.
    """
    first = case.method.traits.layers[0]
    for kind in case.method.traits.layers:
        if kind in PROBES and not kind == first == "linear":  # on which all else is proved
            try:
                _agrees(case, kind, PROBES[kind])
            except Exception as error:
                raise AssertionError(f"at a layer of kind {kind}: {error}") from error


def _agrees(case: Case, kind: str, probe: Probe) -> None:
    import torch

    from adapterpack.torch_adapters.adapt import adapt, detach
    from adapterpack.torch_adapters.layers.active import active
    from adapterpack.torch_adapters.layers.layer import Adapted

    model, reference, generator, x = (
        probe.make().double(),
        probe.make().double(),
        torch.Generator().manual_seed(1),
        to_tensor(probe.x),
    )
    if case.config.acts is not None:
        model.table = reference.table = x
        x = torch.arange(x.shape[1]).expand(x.shape[:2])
    with torch.no_grad():
        for value in model.requires_grad_(False).parameters():
            value.copy_(torch.randn(value.shape, generator=generator))  # numbers that float32 holds, too
    plain = model(x)
    adapt(model, dataclasses.replace(case.config, targets=NAME, dropout=0.0), "a")
    require(
        not case.method.traits.identity_at_init or torch.equal(model(x), plain),
        "a fresh adapter changes the output",
    )
    wrapper = next(module for module in model.modules() if isinstance(module, Adapted))
    trains = [value for value in model.parameters() if value.requires_grad]
    with torch.no_grad():
        for value in trains:
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    ((model(x) - 1.0) ** 2).mean().backward()
    require(
        all(value.grad is not None and bool(value.grad.abs().max() > 0) for value in trains),
        "no gradient reaches a parameter",
    )
    stored, bias = (None if value is None else value.detach().numpy() for value in wrapper._stored)
    assert stored is not None
    own, shared = (
        wrapper._params("a"),
        {name: value.detach().numpy() for name, value in wrapper._shared("a").items()},
    )
    folded, moved = _folded(case, wrapper._site, {**shared, **own}, to_matrix(kind, stored), bias)
    weight = from_matrix(kind, folded, stored.shape)
    names = {NAME: weight, f"{NAME}.weight": weight, f"{NAME}.bias": moved}
    if moved is not None and bias is None:  # a layer without a bias gets one
        reference.get_submodule(NAME).bias = torch.nn.Parameter(to_tensor(moved))
    reference.load_state_dict(
        {name: to_tensor(np.ascontiguousarray(names[name])) for name in reference.state_dict()}
    )
    found, right = model(x).detach().numpy(), reference(x).detach().numpy()
    if case.config.acts is not None:
        acting = case.config.acts.mask(x.numpy(), *2 * (np.ones(x.shape, bool),), None)
        right = np.where(acting[..., None], right, plain.numpy())
    error = float(np.abs(found - right).max())
    require(
        error <= 1e-9 * float(np.abs(right).max() + 1),
        f"the adapted layer and the folded one differ by {error:.2g}",
    )
    require(float(np.abs(found - plain.numpy()).max()) > 1e-3, "a trained adapter changes nothing")
    require(torch.equal(active(model, None)(x), plain), "an adapter that is off changes the output")
    require(torch.equal(detach(model)(x), plain), "an adapter that was taken out changes the output")
    _round(case, wrapper._site, own, shared, (model, right))


def _folded(
    case: Case, site: Site, params: dict[str, np.ndarray], weight: np.ndarray, bias: Any
) -> tuple[np.ndarray, Any]:
    """The fold in float64, matrix by matrix where they are stacked."""
    if is_stacked(site.kind):
        alone = dataclasses.replace(site, kind="parameter")
        every = [
            _folded(case, alone, {name: value[number] for name, value in params.items()}, one, None)[0]
            for number, one in enumerate(weight)
        ]
        return np.stack(every), None
    known = (
        dataclasses.replace(site, weight=weight, base_bias=bias) if case.method.traits.reads_weight else site
    )
    cfg = case.config.at(site.path)
    single = (
        known if known.weight is None else dataclasses.replace(known, weight=known.weight.astype(np.float32))
    )
    made = complete(case.method, cfg, params, single)  # a layer's constants are float32, too
    wide = {name: value.astype(np.float64) if is_float(value) else value for name, value in made.items()}
    return fold(case.method, cfg, wide, known, weight, bias)


def _round(
    case: Case,
    site: Site,
    own: dict[str, np.ndarray],
    shared: dict[str, np.ndarray],
    base: tuple[Any, np.ndarray],
) -> None:
    """A pack of the adapter on a ``base``, a model and the adapter's outputs on it, read by this package and
    by PEFT.
    """
    cfg = dataclasses.replace(case.config.at(site.path), targets="all-linear", modules_to_save=())
    if case.method.storage.to_stored is not None:
        cfg, own = case.method.storage.to_stored(cfg, own, site)
    pack = build(
        "example",
        case.method,
        {site: (cfg, own)},
        shared=shared,
        task=m.PackTask("image-classification"),
        base=m.Base("org/base"),
    )
    with tempfile.TemporaryDirectory() as folder:
        pack.write(Path(folder) / "pack")
        (back,) = load(Path(folder) / "pack").adapters()
        # PEFT looks for tokens in what a language model is called with
        theirs = case.method.peft if cfg.acts is None else None
        if (
            layout.config_bytes(pack.manifest) is not None
            and theirs is not None
            and theirs.peft_supports(cfg, site)
        ):
            _peft_agrees(folder, site.kind, *base)
    require(back.site == site, f"{site} came back as {back.site}")
    require(
        digests({name: back.params[name] for name in own}) == digests(own),
        "tensors came back with other bytes",
    )


def _peft_agrees(folder: str, kind: str, base: Any, right: np.ndarray) -> None:
    """PEFT gives the same from the same folder, in float32, and merged into the weight again."""
    import torch
    from peft import PeftModel

    x = to_tensor(PROBES[kind].x)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base.float(), str(Path(folder) / "pack")).eval()
        x = x.float() if x.is_floating_point() else x
        outputs = {"PEFT": theirs(x), "PEFT merged": theirs.merge_and_unload()(x)}
    for name, found in outputs.items():
        error = float(np.abs(found.numpy() - right).max())
        require(error <= 1e-4 * float(np.abs(right).max() + 1), f"{name} differs by {error:.2g}")
