"""Normalisation layers with adapters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..methods import fold
from .layer import AdaptedLayer


def is_norm(module: nn.Module) -> bool:
    """Whether a module scales normalised inputs by a vector: all norms do, and have no class in common.

    That is a module named so, without modules or running statistics inside, with a vector ``weight`` and perhaps a ``bias`` like it.
    """
    parameters = dict(module.named_parameters())
    plain = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
    named = "norm" in type(module).__name__.lower()
    vectors = all(value.ndim == 1 and value.shape == parameters["weight"].shape for value in parameters.values() if "weight" in parameters)
    return plain and named and vectors and {"weight"} <= parameters.keys() <= {"weight", "bias"}


class AdaptedNorm(AdaptedLayer):
    """A frozen normalisation layer with adapters: the layer itself, called with the weight and the bias that their folds give.

    For a method its weight is a column ``[n, 1]``. What is folded is rounded to the base's precision, as a merge would.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with the active adapters applied."""
        if not self.active:
            return self.base(x, *args, **kwargs)
        base = dict(self.base.named_parameters())
        weight, bias = base["weight"].detach()[:, None], base["bias"].detach() if "bias" in base else None
        for name in self.active:
            method, cfg = self.methods[name]
            site = dataclasses.replace(self.site, weight=weight, base_bias=bias)
            weight, bias = fold(method, cfg, self.every(name), site, weight, bias)
        folded = {"weight": weight[:, 0], "bias": bias}
        return functional_call(self.base, {key: folded[key].to(own.dtype) for key, own in base.items()}, (x, *args), kwargs)
