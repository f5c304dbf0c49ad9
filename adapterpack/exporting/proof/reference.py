"""Loads the torch model that a graph is compared with: it computes in float32 while its weights stay in the
checkpoint's mapped files: linear layers and embeddings keep half precision, and widen a few rows at a time
while they compute.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from ...tasks import Task

# the proof needs this next; importing it here overlaps with writing the weights
from ...torch_adapters import adapt  # noqa: F401
from ..tracing.unread_weights import load_mapped

_BLOCK = 1 << 20
"""Numbers of a weight to widen at a time."""


class ReferenceModel(NamedTuple):
    """A model that computes in float32; ``light`` if its weights are not stored in float32."""

    model: Any
    light: bool


def reference(task: Task, base: Path, whole: bool = False) -> ReferenceModel:
    """Loads the task's model on a base, with its weights mapped where possible; ``whole`` loads them into
    memory in float32.
    """
    model, half = load_mapped(task, base, whole)
    return ReferenceModel(widen(model) if half else model, half)


def widen(model: nn.Module) -> nn.Module:
    """Makes ``model``, whose parameters are in half precision, compute in float32: layers and embeddings
    widen block by block, everything else is widened in place.

    Example:
        >>> import torch
        >>> layer = widen(nn.Linear(4, 3).bfloat16())
        >>> layer(torch.ones(2, 4)).dtype, layer.weight.dtype
        (torch.float32, torch.bfloat16)
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_linear, module)
        elif type(module) is nn.Embedding and module.max_norm is None:
            module.forward = MethodType(_looked_up, module)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().float(), requires_grad=False))
    return model


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    out, width = self.weight.shape
    flat = x.reshape(-1, width)
    y = flat.new_empty((len(flat), out))
    step = max(1, _BLOCK // width)
    for start in range(0, out, step):
        y[:, start : start + step] = flat @ self.weight[start : start + step].to(x.dtype).T
    y = y if self.bias is None else y + self.bias.to(x.dtype)
    return y.reshape(*x.shape[:-1], out)


def _looked_up(self: nn.Embedding, ids: Tensor) -> Tensor:
    return functional.embedding(ids, self.weight).float()
