"""What goes wrong when an adapter is carried from one tool to another, done to a LoRA's factors: packs with these
faults stand for targets that load a pack wrongly.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from adapterpack import LoRA, adapt, save
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8
Factors = dict[str, torch.Tensor]
"""The factors of an adapter by name: ``...lora_A`` is ``[rank, in]``, ``...lora_B`` is ``[out, rank]``."""


def _layer(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    assert found is not None
    return int(found.group(1))


def _times(
    factor: float, chosen: Callable[[str, int], bool] = lambda name, last: True
) -> Callable[..., None]:
    """Multiplies the change at the chosen sites, of which the name and the last layer's number are given."""

    def change(factors: Factors) -> None:
        last = max(map(_layer, factors))
        for name, tensor in factors.items():
            if name.endswith("lora_B") and chosen(name, last):
                tensor.mul_(factor)

    return change


def _swapped(one: str, other: str) -> Callable[[Factors], None]:
    def change(factors: Factors) -> None:
        for name in [name for name in factors if f".{one}." in name]:
            there = name.replace(f".{one}.", f".{other}.")
            first, second = factors[name].clone(), factors[there].clone()
            factors[name].copy_(second)
            factors[there].copy_(first)

    return change


def _transposed(factors: Factors) -> None:
    for name in [name for name in factors if name.endswith("lora_A")]:
        down, up = factors[name], factors[name.replace("lora_A", "lora_B")]
        if down.shape == up.T.shape:
            first, second = down.clone(), up.clone()
            down.copy_(second.T)
            up.copy_(first.T)


def _one_layer_on(factors: Factors) -> None:
    before, count = {name: tensor.clone() for name, tensor in factors.items()}, max(map(_layer, factors)) + 1
    for name, tensor in factors.items():
        number = _layer(name)
        tensor.copy_(before[name.replace(f".layers.{number}.", f".layers.{(number + 1) % count}.")])


def _ranks_reversed(factors: Factors) -> None:
    for name, tensor in factors.items():
        if name.endswith("lora_B"):
            tensor.copy_(tensor.flip(1))


def _downs_of_another(factors: Factors) -> None:
    random_factors({name: tensor for name, tensor in factors.items() if name.endswith("lora_A")}, 99, 1.0)


FAULTS: Mapping[str, Callable[[Factors], None]] = {
    "nothing": _times(0),
    "twice": _times(2),
    "halved": _times(0.5),
    "quarter": _times(0.25),
    "rslora": _times(RANK**0.5),
    "undivided": _times(RANK),
    "negative": _times(-1),
    "first-half": _times(0, lambda name, last: 2 * _layer(name) <= last),
    "second-half": _times(0, lambda name, last: 2 * _layer(name) > last),
    "no-q": _times(0, lambda name, last: ".q_proj." in name),
    "no-v": _times(0, lambda name, last: ".v_proj." in name),
    "no-down": _times(0, lambda name, last: ".down_proj." in name),
    "no-mlp": _times(0, lambda name, last: ".mlp." in name),
    "no-attention": _times(0, lambda name, last: ".self_attn." in name),
    "only-q-and-v": _times(0, lambda name, last: ".q_proj." not in name and ".v_proj." not in name),
    "transposed": _transposed,
    "one-layer-on": _one_layer_on,
    "q-for-o": _swapped("q_proj", "o_proj"),
    "gate-for-up": _swapped("gate_proj", "up_proj"),
    "ranks-reversed": _ranks_reversed,
    "downs-of-another": _downs_of_another,
}


def random_factors(factors: Factors, seed: int, strength: float) -> None:
    """Fills factors with noise whose effect does not grow with the width."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in factors.items():
        size = tensor.shape[1] ** -0.5 if name.endswith("lora_A") else 0.02 * strength
        tensor.copy_(size * torch.randn(tensor.shape, generator=generator))


def write_packs(base: Path, folder: Path, good: int, strength: float = 1.0) -> None:
    """Writes a LoRA as the pack ``good``, with each fault as ``fault-NAME``, one with other numbers as
    ``fault-other``, and so many LoRAs without a fault, of several ranks, strengths and sites, as ``good-N``.
    """
    model = load_model(get_task("text-generation"), base)

    def write(
        name: str,
        seed: int,
        change: Callable[[Factors], None] = lambda factors: None,
        by: float = strength,
        **fields: Any,
    ) -> None:
        adapted = adapt(
            copy.deepcopy(model), LoRA(**{"r": RANK, "alpha": 16, "targets": LINEAR, **fields}), name
        )
        with torch.no_grad():
            factors = {
                key: parameter.data
                for key, parameter in adapted.named_parameters()
                if parameter.requires_grad
            }
            random_factors(factors, seed, by)
            change(factors)
        save(adapted, folder / name, base=base)

    write("good", 1)
    write("fault-other", 2)
    for name, change in FAULTS.items():
        write(f"fault-{name}", 1, change)
    dice = random.Random(5)
    for number in range(good):
        sites = dice.choice([LINEAR, LINEAR[:4], LINEAR[4:], ("q_proj", "v_proj")])
        options: dict[str, Any] = {
            "r": dice.choice([4, 8]),
            "alpha": dice.choice([8, 16, 32]),
            "targets": sites,
        }
        write(f"good-{number}", 100 + number, by=strength * dice.choice([0.3, 1, 2]), **options)
