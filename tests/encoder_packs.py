"""Random packs and texts for the tiny encoder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from adapterpack import LoRA, adapt, save
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

LONG = 64
"""Positions of the tiny base."""


def words(dice: random.Random, most: int = LONG) -> str:
    return " ".join(f"w{dice.randrange(40)}" for _ in range(dice.randrange(1, most + 1)))


def packed(
    base: Path, folder: Path, task: str, name: str, labels: list[str] | None = None, **fields: Any
) -> Path:
    """A random LoRA on the base's model of a task."""
    model = adapt(load_model(get_task(task), base, labels), LoRA(**fields), name)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save(model, folder / name, base=base)
    return folder / name
