"""Loads the models of several trainings so that what they have of one base is in memory once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...tasks.task import Task
from ...torch_adapters.models.load import load_for_task


class SharedBases:
    """Models over bases that are in memory once: each has modules of its own, which hold the same parameters.

    These are frozen while adapters are trained, and whoever moves them moves them for all. Buffers, which a
    model may change when it is called, are each model's own.
    """

    def __init__(self) -> None:
        self._fresh: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}
        self._held: dict[tuple[Any, ...], dict[str, nn.Parameter]] = {}

    def load(
        self,
        task: Task,
        folder: Path,
        labels: Sequence[str] | None = None,
        *,
        dtype: str,
        quantization: Any,
        problem: str | None,
    ) -> tuple[Any, list[str]]:
        """Load a model as :func:`~adapterpack.torch_adapters.models.load.load_for_task` does, or copy one
        of the same task and labels. Models with other heads share the parameters that are equal.
        """
        base = folder, dtype, repr(quantization)
        key = *base, task.name, tuple(labels or ()), problem
        if key not in self._fresh:
            model, new = load_for_task(
                task, folder, labels, dtype=dtype, quantization=quantization, problem=problem
            )
            _share(model, self._held.setdefault(base, {}))
            self._fresh[key] = model, new
        model, new = self._fresh[key]
        return copy.deepcopy(model, {id(value): value for value in model.parameters()}), list(new)


def _share(model: Any, held: dict[str, nn.Parameter]) -> None:
    """Puts the parameters that are ``held`` in the place of equal ones of the same name, and adds the others
    to them.
    """
    instead: dict[int, nn.Parameter] = {}
    prefix = f"{model.base_model_prefix}."
    for name, value in model.named_parameters():
        other = held.setdefault(name.removeprefix(prefix), value)
        if other is not value and _equal(other, value):
            instead[id(value)] = other
    for module in model.modules():
        for leaf, value in module._parameters.items():
            if id(value) in instead:
                module._parameters[leaf] = instead[id(value)]


def _equal(one: nn.Parameter, other: nn.Parameter) -> bool:
    """Whether two parameters are of one class and hold the same numbers, wherever they are."""
    if (
        type(one) is not type(other)
        or one.shape != other.shape
        or one.dtype != other.dtype
        or one.is_meta
        or other.is_meta
    ):
        return False
    return bool(torch.equal(one.detach(), other.detach().to(one.device)))
