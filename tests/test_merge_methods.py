"""Merged output == adapted output, for every foldable method of the registry on every family of models.

The suite runs every method on three families and three methods, one of each class, on all others; all pairs
with ``ADAPTERPACK_MATRIX=full``, which takes some minutes.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family

import adapterpack
from adapterpack import LoRA, adapt, save
from adapterpack.adapter_methods import Method, get, methods
from adapterpack.errors import Unsupported

FOLDABLE = [
    method
    for method in methods().values()
    if method.kind == "weight" and method.examples[0].acts is None and not method.reason_against("fold")
]
EVERY_METHOD = ("llama", "gpt2", "bert")
"""Families on which the suite runs every method: a decoder with biases, layers that are stored turned, an
encoder with a head.
"""
CLASSES = ("lora", "dora", "oft")
"""What adds factors, what reads the weight, and what turns it: run on every family."""
FULL = os.environ.get("ADAPTERPACK_MATRIX") == "full"


def applies(family: Family, method: Method) -> bool:
    """Whether a family has layers of a kind that the method lists; of tables, for a method that is theirs
    first.
    """
    layers = method.traits.layers
    return bool(set(family.kinds) & set(layers[:1] if layers[0] == "table" else layers))


CASES = [
    pytest.param(name, method.name, None, id=f"{name}-{method.name}")
    for name, family in FAMILIES.items()
    for method in FOLDABLE
    if applies(family, method) and (FULL or name in EVERY_METHOD or method.name in CLASSES)
]
CASES += [
    pytest.param(name, "lora", kind, id=f"{name}-lora-{kind}")
    for name, family in FAMILIES.items()
    for kind in family.more
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A family's model and its folder, made when it is first asked for."""

    @cache
    def make(name: str) -> tuple[Any, Path]:
        model, folder = FAMILIES[name].build(), tmp_path_factory.mktemp("families") / name
        model.save_pretrained(folder)
        return model, folder

    return make


def _trained(family: Family, model: torch.nn.Module, plain: torch.Tensor) -> None:
    """Moves the adapter until the output shows it: by as little as that, since large changes make float32
    itself inexact.
    """
    torch.manual_seed(5)
    for _ in range(8):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.03 * torch.randn_like(parameter))
        if (family(model) - plain).abs().max() > 1e-3 * plain.abs().max():
            return
    raise AssertionError("the adapter changes nothing")


@pytest.mark.sampled(10)
@pytest.mark.parametrize(("name", "method", "kind"), CASES)
def test_merged_is_adapted(
    bases: Callable[[str], tuple[Any, Path]], name: str, method: str, kind: str | None, tmp_path: Path
) -> None:
    """The merged checkpoint, loaded by transformers, gives the adapted model's output within 1e-5 of its
    largest (float32).
    """
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    family, (base, folder) = FAMILIES[name], bases(name)
    config = get(method).examples[0] if kind is None else LoRA(r=2, alpha=3, targets=family.more[kind])
    fields = {field.name for field in dataclasses.fields(config)}
    if name == "clip" and "token_indices" in fields:
        config = dataclasses.replace(config, targets=("token_embedding",))
    if kind is None and "targets" in fields and get(method).traits.layers[0] == "linear":
        config = dataclasses.replace(config, targets="all-linear")
    if "bound" in fields:  # a change is as large as that, however little was trained
        config = dataclasses.replace(config, bound=0.5)
    model = adapt(copy.deepcopy(base), config, "one").eval()
    _trained(family, model, family(base))
    pack = save(model, tmp_path / "pack", base=folder)
    if kind is not None:
        assert kind in {group.kind for group in pack.manifest.groups}
    # a bias where the base's files have no place for one
    if method == "beft" and not all(group.bias for group in pack.manifest.groups):
        with pytest.raises(Unsupported, match="gives this site a bias, and the base has none"):
            adapterpack.merge(folder, [pack], tmp_path / "out")
        return
    adapterpack.merge(folder, [pack], tmp_path / "out", durable=False)
    adapted, merged = family(model), family(family.load(tmp_path / "out"))
    torch.testing.assert_close(merged, adapted, atol=1e-5 * float(adapted.abs().max()), rtol=0)
