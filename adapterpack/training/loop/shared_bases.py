"""Loads models for several trainings with a single copy of their base's parameters in memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...tasks import Task
from ...torch_adapters import load_for_task


class SharedBases:
    """Models whose modules are their own but hold the same parameters of each base.

    The parameters are frozen while adapters train; moving them moves them for all models. Buffers, which
    calls may change, are each model's own.
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
        """Loads a model as :func:`~adapterpack.torch_adapters.models.load.load_for_task` does, or copies one
        with the same task and labels. Models with different heads share all equal parameters.
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
        # With its parameters in the memo, deepcopy copies modules and buffers but shares the parameters.
        return copy.deepcopy(model, {id(value): value for value in model.parameters()}), list(new)


def _share(model: Any, held: dict[str, nn.Parameter]) -> None:
    """Replaces the model's parameters by equal ones of the same name in ``held``, and adds the others to
    ``held``.
    """
    instead = {}
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
    """Whether two parameters have the same class, shape, dtype and values, on whatever devices."""
    if (
        type(one) is not type(other)
        or one.shape != other.shape
        or one.dtype != other.dtype
        or one.is_meta
        or other.is_meta
    ):
        return False
    return bool(torch.equal(one.detach(), other.detach().to(one.device)))
