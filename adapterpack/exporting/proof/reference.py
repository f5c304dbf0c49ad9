"""The model that a graph is compared with, in torch: its weights stay in the checkpoint's mapped files, and
it computes in float32.

transformers maps weights that need no other type. Where a checkpoint is in halves, a float32 model would be a
copy of it twice its size. So its linear layers and tables keep their halves, and widen them while they
compute, a few rows at a time.
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

# adapters need it next: it is loaded with the model, while the weights are written
from ...torch_adapters import adapt  # noqa: F401
from ...torch_adapters.models.load import load_model

_LARGE = 64 << 20
"""Numbers up to which a whole model in float32 is no burden: 256 MB."""
_BLOCK = 1 << 20
"""Numbers of a weight that are widened at a time."""
_HALVES = {"BF16": "bfloat16", "F16": "float16"}


class ReferenceModel(NamedTuple):
    """A model that computes in float32; ``light`` where its weights do not lie there in float32."""

    model: Any
    light: bool


def reference(task: Task, base: Path, whole: bool = False) -> ReferenceModel:
    """The task's model on a base, with its weights mapped where that can be; ``whole`` has them in memory, in
    float32.
    """
    half = None if whole else _half(base)
    if half is not None:
        model = load_model(task, base, dtype=half).eval()
        # rounded numbers stay so
        if all(buffer.dtype == torch.float32 or not buffer.is_floating_point() for buffer in model.buffers()):
            return ReferenceModel(widen(model), True)
    return ReferenceModel(load_model(task, base).eval(), False)


def _half(base: Path) -> str | None:
    """The one float type of a large checkpoint, if that is a half and all its numbers are plain."""
    checkpoint = Checkpoint(base)
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    numbers = sum(info.nbytes // 2 for info in checkpoint.tensors.values())
    quantized = "quantization_config" in checkpoint.config
    return (
        _HALVES.get(next(iter(dtypes))) if len(dtypes) == 1 and numbers > _LARGE and not quantized else None
    )


def widen(model: nn.Module) -> nn.Module:
    """``model``, whose parameters are halves, computing in float32: layers and tables do so block by block,
    all else is widened in place.

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
