"""Loads the torch model that a graph is compared with: it computes in float32 while its weights stay in the
checkpoint's mapped files.

transformers maps weights that it need not convert. For a checkpoint in half precision, a float32 model would
be a copy of twice the size. So linear layers and embeddings keep half precision, and widen a few rows at a
time while they compute.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ...base.checkpoint import Checkpoint
from ...tasks.task import Task

# the proof needs this next; importing it here overlaps with writing the weights
from ...torch_adapters import adapt  # noqa: F401
from ...torch_adapters.models.load import load_model

_LARGE = 64 << 20
"""Models up to this many parameters are loaded in float32 (256 MB)."""
_BLOCK = 1 << 20
"""Numbers of a weight to widen at a time."""
_HALVES = {"BF16": "bfloat16", "F16": "float16"}


class ReferenceModel(NamedTuple):
    """A model that computes in float32; ``light`` if its weights are not stored in float32."""

    model: Any
    light: bool


def reference(task: Task, base: Path, whole: bool = False) -> ReferenceModel:
    """Loads the task's model on a base, with its weights mapped where possible; ``whole`` loads them into
    memory in float32.
    """
    half = None if whole else _half(base)
    if half is not None:
        model = load_model(task, base, dtype=half).eval()
        # buffers in half precision would stay rounded
        if all(buffer.dtype == torch.float32 or not buffer.is_floating_point() for buffer in model.buffers()):
            return ReferenceModel(widen(model), True)
    return ReferenceModel(load_model(task, base).eval(), False)


def _half(base: Path) -> str | None:
    """Returns the dtype of a large checkpoint if all its weights are unquantized and in one half-precision
    type; else None.
    """
    checkpoint = Checkpoint(base)
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    numbers = sum(info.nbytes // 2 for info in checkpoint.tensors.values())
    quantized = "quantization_config" in checkpoint.config
    return (
        _HALVES.get(next(iter(dtypes))) if len(dtypes) == 1 and numbers > _LARGE and not quantized else None
    )


def widen(model: nn.Module) -> nn.Module:
    """Makes ``model``, whose parameters are in half precision, compute in float32: layers and embeddings
    widen block by block, everything else is widened in place.

    Example:
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


def _linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    out, width = self.weight.shape
    flat = x.reshape(-1, width)
    y = flat.new_empty((len(flat), out))
    step = max(1, _BLOCK // width)
    for start in range(0, out, step):
        y[:, start : start + step] = flat @ self.weight[start : start + step].to(x.dtype).T
    y = y if self.bias is None else y + self.bias.to(x.dtype)
    return y.reshape(*x.shape[:-1], out)


def _looked_up(self: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return functional.embedding(ids, self.weight).float()
