"""transformers.exporters (torch.export): encoders and classifiers of any architecture."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..sitemap import torch_scope
from .base import BaseGraph, Frontend

_AXES = ("batch", "sequence")


def _supports(config: Mapping[str, Any], task: str) -> bool:
    return task in {"text-classification", "feature-extraction"}


def _build(folder: Path, task: str) -> BaseGraph:
    import torch  # noqa: PLC0415 - heavy, and only this frontend needs it
    import transformers as hf  # noqa: PLC0415
    from transformers.exporters import OnnxConfig, OnnxExporter  # noqa: PLC0415

    from ...tasks import task_named  # noqa: PLC0415
    from ...train.train import load_model, quiet_transformers  # noqa: PLC0415

    model = _with_linear_layers(load_model(task_named(task), folder).eval())
    example = {"input_ids": torch.full((2, 7), 1), "attention_mask": torch.ones((2, 7), dtype=torch.int64)}
    example["attention_mask"][1, 5:] = 0
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), quiet_transformers(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        shapes = {name: dict.fromkeys(range(2), torch.export.Dim.DYNAMIC) for name in example}
        graph = OnnxExporter().export(model, example, OnnxConfig(dynamic=True, dynamic_shapes=shapes)).program
    _name_axes(graph)
    return BaseGraph(graph, torch_scope, f"transformers {hf.__version__}")


def _with_linear_layers(model: Any) -> Any:
    """GPT-2's ``Conv1D`` as the linear layers that they are: their own forward flattens the batch, which a bank may not."""
    from torch import nn  # noqa: PLC0415 - see above
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    for parent in list(model.modules()):
        for leaf, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                layer = nn.utils.skip_init(nn.Linear, child.nx, child.nf, dtype=child.weight.dtype)
                layer.weight, layer.bias = nn.Parameter(child.weight.detach().T.contiguous()), child.bias
                setattr(parent, leaf, layer)
    return model


def _name_axes(model: Any) -> None:
    """The exporter's symbols (``s43``), of which each input may have its own, become ``batch`` and ``sequence``, everywhere."""
    import onnx_ir as ir  # noqa: PLC0415 - beside torch, for the same reason

    names = {str(dim.value): name for value in model.graph.inputs for dim, name in zip(value.shape, _AXES, strict=True)
             if not isinstance(dim, int)}
    for value in [*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)]:
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else names.get(str(dim.value), dim.value) for dim in value.shape]
            value.shape = ir.Shape(dims)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


transformers = Frontend("transformers", _supports, _build)
