"""Loads a task's model without reading its weights: they stay in the checkpoint's mapped files, in half
precision, and a traced graph refers to them there.

transformers maps weights that it need not convert. A float32 model of a checkpoint in half precision would be
a copy of twice the checkpoint's size.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ...base import Checkpoint
from ...onnx_graph import SlicedTensor
from ...tasks import Task
from ...torch_adapters.models.load import load_model

_LARGE = 64 << 20
"""Models up to this many parameters are loaded in float32 (256 MB)."""
_STAND_IN = 1 << 16
"""Parameters of at least so many numbers are traced without their numbers."""
_HALVES = {"BF16": "bfloat16", "F16": "float16"}


class Mapped(NamedTuple):
    """A task's model; ``half`` if its parameters are in half precision, in the checkpoint's files."""

    model: Any
    half: bool


def load_mapped(task: Task, base: Path, whole: bool) -> Mapped:
    """Loads a model in half precision if the base is large and in that type alone, and everything that the
    model computes itself is in float32; else, or with ``whole``, in float32.
    """
    half = None if whole else _half(base)
    if half is not None:
        model = load_model(task, base, dtype=half).eval()
        # what a module computes in half precision, without a parameter of the checkpoint, would stay rounded
        computed = [value for module in model.modules() for value in _tensors_of(module)]
        if all(value.dtype == torch.float32 or not value.is_floating_point() for value in computed):
            return Mapped(model, True)
    return Mapped(load_model(task, base).eval(), False)


def _tensors_of(module: nn.Module) -> Iterable[Tensor]:
    """Returns the tensors of a module itself that are no parameters."""
    plain = (value for value in vars(module).values() if isinstance(value, Tensor))
    return (*module.buffers(recurse=False), *plain)


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


class UnreadWeights:
    """Makes ``model``, whose parameters are in half precision, a float32 model whose large parameters are
    zeros, to be traced; :meth:`fill` gives the traced graphs the weights.

    The zeros are pages that are never written, so they take no memory. An initializer is the weight on whose
    zeros it lies; its place and strides there say how the exporter turned or cut it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights: list[tuple[int, np.ndarray, Tensor]] = []
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter not in made:  # parameters that are tied stay one
                    made[parameter] = nn.Parameter(self._in_place_of(parameter.detach()), requires_grad=False)
                module._parameters[name] = made[parameter]
            if getattr(getattr(module, "config", None), "dtype", None) is not None:
                module.config.dtype = torch.float32  # type: ignore[union-attr]

    def _in_place_of(self, weight: Tensor) -> Tensor:
        if weight.numel() < _STAND_IN or weight.dtype == torch.float32:
            return weight.float()
        zeros = np.zeros(tuple(weight.shape), np.float32)
        zeros.flat[0] = 1 + len(self._weights)  # exporters join tensors that are equal
        insort(self._weights, (zeros.ctypes.data, zeros, weight.contiguous()), key=itemgetter(0))
        return torch.from_numpy(zeros)

    def fill(self, graphs: Iterable[ir.Model]) -> bool:
        """Replaces the zeros among the initializers of traced graphs by the weights, widened to float32 when
        they are read; False if the exporter computed an initializer from a weight, whose zeros it kept.
        """
        for model in graphs:
            for value in (value for graph in model.graphs() for value in graph.initializers.values()):
                tensor = value.const_value
                if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < _STAND_IN:
                    continue
                array = tensor.numpy()
                if (weight := self._weight_under(array)) is not None:
                    value.const_value = _widen_late(weight, value.name)
                elif np.count_nonzero(array) <= 1:
                    return False
        return True

    def _weight_under(self, array: np.ndarray) -> Tensor | None:
        """Returns the part of a weight on whose zeros an array lies, in the order of the array."""
        after = bisect_right(self._weights, array.ctypes.data, key=itemgetter(0))
        if not after:
            return None
        start, zeros, weight = self._weights[after - 1]
        place = array.ctypes.data - start
        if place >= zeros.nbytes:
            return None
        strides = [stride // array.itemsize for stride in array.strides]
        return weight.as_strided(array.shape, strides, place // array.itemsize)


def _widen_late(weight: Tensor, name: str | None) -> SlicedTensor:
    return SlicedTensor(
        lambda index: weight[index].float().numpy(), ir.DataType.FLOAT, tuple(weight.shape), name
    )
