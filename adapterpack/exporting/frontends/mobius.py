"""mobius-onnx: builds decoder language models in seconds; weights keep their names and have the layout of
MatMul.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ...base import reaches_of, read_json
from ...graph_passes import onnxscript_scope
from ...io import Config
from ...onnx_graph import SlicedTensor, add_initializer, constant_input, inputs_of, named_node
from ...slots import DEFAULT
from ..tracing.example_inputs import config_of
from .base import FRONTENDS, BaseGraph, ExportSource, Frontend

if TYPE_CHECKING:
    import torch
    from torch import nn


def _build(source: ExportSource) -> BaseGraph:
    import mobius as builder  # noqa: PLC0415 - heavy, and only this frontend needs it

    from ...torch_adapters.models.load import empty_model  # noqa: PLC0415 - loads torch

    logging.getLogger("mobius").setLevel(logging.WARNING)
    with contextlib.redirect_stderr(io.StringIO()):  # silences its progress bars
        package = builder.build(
            str(source.folder),
            task=source.task.name,
            execution_provider="default",
            dtype=_DTYPES[source.dtype],
        )
    model = package["model"]
    model.graph.name = source.folder.name  # not the path, which may be a scratch folder's
    if source.dtype == DEFAULT:
        _exact_scale(model.graph, read_json(source.folder / "config.json").get("hidden_size"))
    _read_in_slices(model.graph)
    _own_epsilons(model.graph, empty_model(source.folder, source.task))
    _separate_rows(model.graph)
    _look_back(model.graph, config_of(source.folder).to_dict())
    return BaseGraph(model, onnxscript_scope, f"mobius-onnx {version('mobius-onnx')}")


_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""Float type -> the builder's name for it."""
_Number = int | list[int] | np.generic | np.ndarray


def _read_in_slices(graph: ir.Graph) -> None:
    """Lets weights in half precision be widened a slice at a time: the builder widens each as a whole."""
    for name, value in graph.initializers.items():
        tensor = value.const_value
        stored = _checkpoint_weight(value)
        if stored is not None and tensor.dtype == ir.DataType.FLOAT and stored.shape == tuple(tensor.shape):
            read = partial(_widen, stored)
            value.const_value = SlicedTensor(read, tensor.dtype, tuple(tensor.shape), name)


def _checkpoint_weight(value: ir.Value) -> torch.Tensor | None:
    """Returns the weight of the checkpoint on which a value waits: the default of the function that widens
    it, or, turned, that of a value, which is the default of the function that turns it.
    """
    tensor = value.const_value
    given = tensor.raw.__defaults__ if isinstance(tensor, ir.LazyTensor) else None
    held: Any = given[0] if given else None
    if isinstance(held, ir.Value):
        weight = _checkpoint_weight(held)
        return None if weight is None else weight.T
    return held if hasattr(held, "float") else None


def _widen(weight: torch.Tensor, index: tuple[object, ...]) -> Any:
    return weight[index].float().numpy()


def _exact_scale(graph: ir.Graph, hidden: object) -> None:
    """Restores the exact factor sqrt(hidden) after Gemma's embeddings. The builder rounds it to float16, an
    error of up to 5e-4 in every output.
    """
    if not isinstance(hidden, int):
        return
    exact = math.sqrt(hidden)
    for node in [node for node in graph if node.op_type == "Mul"]:
        source = node.inputs[0].producer()
        factor = constant_input(node, 1)
        if source is None or source.op_type != "Gather" or factor is None or factor.size != 1:
            continue
        if 0 < abs(factor.item() - exact) < 1e-3 * exact:
            scale = ir.tensor(np.full(factor.shape, exact, np.float32), name=f"{node.name}.exact_scale")
            node.replace_input_with(1, add_initializer(graph, scale))


def _own_epsilons(graph: ir.Graph, model: nn.Module) -> None:
    """Gives each norm the model's own epsilon. The builder gives all of them that of the configuration,
    but those of latents have another one (LongCat-Flash: 1e-6 for 1e-5), which a proof may not see.
    """
    modules = dict(model.named_modules())
    for node in [node for node in graph if "epsilon" in node.attributes]:
        module = modules.get(onnxscript_scope(node) or "")
        own = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if isinstance(own, float):
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", own)


def _separate_rows(graph: ir.Graph) -> None:
    """Uses the last position of each row where the builder uses that of the longest row: the choice of
    LongRoPE's tables depends on it.
    """
    for node in [
        node for node in graph if node.op_type == "ReduceMax" and node.inputs[0].name == "position_ids"
    ]:
        node.resize_inputs(2)
        axis = ir.tensor(np.array([1], np.int64), name=f"{node.name}.axis")
        node.replace_input_with(1, add_initializer(graph, axis))
        node.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
        batch = node.inputs[0].shape[0]
        todo = [node.outputs[0]]
        # Values that were one number for the batch are now one for each row: follow them up to the positions.
        while todo:
            one = todo.pop()
            if one.shape is not None and not len(one.shape):
                one.shape = ir.Shape([batch, 1])
                todo += [output for use in one.uses() for output in use.node.outputs]


def _look_back(graph: ir.Graph, config: Config) -> None:
    """Gives every attention the mask of its layer in models with sliding windows: the builder omits windows,
    or puts them at other layers than transformers does.
    """
    attentions = [node for node in graph if node.op_type == "Attention" and len(node.outputs) > 1]
    reaches = reaches_of(config, len(attentions))
    inputs = inputs_of(graph)
    if not any(reach.window for reach in reaches) or not {"input_ids", "attention_mask"} <= inputs.keys():
        return
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value | _Number, **attributes: object) -> ir.Value:
        values = [value if isinstance(value, ir.Value) else _constant(graph, value) for value in inputs]
        nodes.append(named_node(op, f"look_back/{len(nodes)}", *values, **attributes))
        return nodes[-1].outputs[0]

    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    places = add("CumSum", mask, 1)
    total = add("Shape", mask, start=1, end=2)
    queries = add("Slice", places, add("Sub", total, add("Shape", ids, start=1, end=2)), total, [1])
    back = add("Sub", add("Unsqueeze", queries, [2]), add("Unsqueeze", places, [1]))
    seen = add(
        "And",
        add("GreaterOrEqual", back, 0),
        add("Cast", add("Unsqueeze", mask, [1]), to=ir.DataType.BOOL),
    )
    biases = {}
    for node, reach in zip(attentions, reaches, strict=True):  # the builder creates attentions in layer order
        if reach.window not in biases:
            near = seen if reach.window is None else add("And", seen, add("Less", back, reach.window))
            dtype = node.inputs[4].dtype
            least = -65504.0 if dtype == ir.DataType.FLOAT16 else np.finfo(np.float32).min
            # not -inf: a padding token attends to nothing, and its softmax would be NaN
            lowest = np.array(least, np.float32)
            biases[reach.window] = add(
                "Cast", add("Unsqueeze", add("Where", near, np.float32(0), lowest), [1]), to=dtype
            )
        node.replace_input_with(3, biases[reach.window])
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)
    graph.insert_before(graph[0], nodes)


def _constant(graph: ir.Graph, value: _Number) -> ir.Value:
    array = value if isinstance(value, np.generic | np.ndarray) else np.array(value, np.int64)
    name = f"look_back/{array.dtype}/{array.tolist()}"
    if name not in graph.initializers:
        add_initializer(graph, ir.tensor(np.asarray(array), name=name))
    return graph.initializers[name]


mobius = FRONTENDS.register(
    Frontend(
        "mobius",
        lambda source: source.file is None and source.task.name == "text-generation",
        _build,
        rank=10,
    )
)
