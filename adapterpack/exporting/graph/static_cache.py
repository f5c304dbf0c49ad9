"""A decoder's graph for one token a step, on caches that stay where they are.

The ordinary graph gives its cache anew with every token. Here each attention becomes ``GroupQueryAttention``, which writes the new keys
and values into the buffers that it reads: ``present`` may be the memory of ``past``. Rows lie at the beginning of their buffers, without
padding, and ``attention_mask`` says how long each is, the new token included.
Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...base.base_folder import read_json
from ...bundle.manifest import PAST, PRESENT, STEP, graph_file
from ...errors import Unsupported
from ...tasks.task import MAIN
from .attention import attention_inputs

_PREFIX = "in_place/"
_THROUGH = frozenset({"Reshape", "Expand", "Unsqueeze", "Transpose", "Mul", "Cast"})
"""What may be between a cache and the product with it: heads are repeated, keys are turned and scaled."""


class _Attention(NamedTuple):
    """One attention of the graph: what goes in, the node that gives ``output``, and how it scores."""

    queries: Any
    keys: Any
    values: Any
    output: Any
    layer: int
    heads: int
    scale: float
    softcap: float = 0.0


def write_step(folder: Path) -> None:
    """Derives the graph for steps from the ordinary one, into the same folder of the bundle; both have the same file of weights.

    Raises:
        Unsupported: an attention of the graph is of no known build.
    """
    model = ir.load(folder / graph_file(MAIN))
    make_step(model, read_json(folder / "config.json"))
    ir.save(model, folder / graph_file(STEP))


def make_step(model: Any, config: Mapping[str, Any]) -> None:
    """Changes a decoder's graph, in place; ``config`` is the model's.

    Raises:
        Unsupported: an attention of the graph is of no known build.
    """
    graph = model.graph
    caches = {value.name: value for value in graph.inputs if value.name.startswith(PAST)}
    attentions = sorted(_attentions(model), key=lambda attention: attention.layer)
    if not attentions or [attention.layer for attention in attentions] != list(range(len(caches) // 2)):
        raise Unsupported("no attention of a known build writes into each cache of this graph", expected=f"{len(caches) // 2} of them",
                          found=len(attentions), remedy="leave --static-cache out")
    lengths, total = _lengths(model)
    windows, cap = _windows(config, len(attentions)), config.get("attn_logit_softcapping") or 0.0
    for attention in attentions:
        _replace(model, attention._replace(softcap=attention.softcap or float(cap)), lengths, total, windows[attention.layer])
    RemoveUnusedNodesPass()(model)
    wrong = sorted(name for name, value in caches.items() if not all(map(_knows_rows, (use.node for use in value.uses()))))
    if wrong:
        raise Unsupported("more than its attention reads a cache of this graph", found=", ".join(wrong[:4]),
                          remedy="leave --static-cache out")
    model.opset_imports["com.microsoft"] = 1


def _knows_rows(node: Any) -> bool:
    """Whether a reader of a cache is its attention, or reads only its batch size: its length says nothing about the rows any more."""
    of_rows = node.op_type == "Shape" and (node.attributes.get_int("start", 0), node.attributes.get_int("end", 0)) == (0, 1)
    return of_rows or node.op_type == "GroupQueryAttention"


def _attentions(model: Any) -> Iterator[_Attention]:
    """Every attention on a cache, in whatever build."""
    layers = {value.name: int(value.name.removeprefix(PRESENT).partition(".")[0])
              for value in model.graph.outputs if value.name.startswith(PRESENT)}
    for node in model.graph:
        if node.op_type == "Attention" and len(node.outputs) > 1 and node.outputs[1].name in layers:
            queries, keys, values = node.inputs[:3]
            inputs = attention_inputs(node)
            if inputs is not None:
                yield _Attention(queries, keys, values, node.outputs[0], layers[node.outputs[1].name], inputs.heads, inputs.scale,
                                 node.attributes.get_float("softcap", 0.0))
        elif node.op_type == "Softmax":
            yield from _of_softmax(node, layers)


def _of_softmax(node: Any, layers: Mapping[str, int]) -> Iterator[_Attention]:
    inputs = attention_inputs(node)
    product = next((user for user, place in node.outputs[0].uses() if user.op_type == "MatMul" and place == 0), None)
    if inputs is None or product is None:
        return
    values, keys = (_cached(value, layers) for value in (product.inputs[1], inputs.keys))
    if values is not None and keys is not None and layers[values.name] == layers[keys.name]:
        yield _Attention(inputs.queries, keys.producer().inputs[1], values.producer().inputs[1], _after_mask(product.outputs[0]),
                         layers[values.name], inputs.heads, inputs.scale)


def _after_mask(value: Any) -> Any:
    """An attention's output, after the Where that zeroes tokens which attend to nothing: in a step every token attends to itself."""
    uses = list(value.uses())
    node = uses[0].node if len(uses) == 1 else None
    if node is not None and node.op_type == "Where" and uses[0].idx == 2:
        replacement = ir.convenience.get_const_tensor(node.inputs[1])
        if replacement is not None and not replacement.numpy().any():
            return node.outputs[0]
    return value


def _cached(value: Any, layers: Mapping[str, int]) -> Any:
    """The cache that a value is a form of, as its Concat with the past gives it; or None."""
    while value is not None and value.name not in layers:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _THROUGH else None
    node = None if value is None else value.producer()
    return value if node is not None and node.op_type == "Concat" and len(node.inputs) == 2 else None


def _lengths(model: Any) -> tuple[Any, Any]:
    """How long each row is without the new token, ``[batch]`` int32, and the longest with it, int32; both of the mask."""
    graph = model.graph
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    axis, one = (_constant(model, name, np.array(number, np.int64)) for name, number in (("axis", [1]), ("one", 1)))
    summed = ir.node("ReduceSum", [mask, axis], {"keepdims": 0}, name=f"{_PREFIX}sum")
    before = ir.node("Sub", [summed.outputs[0], one], name=f"{_PREFIX}before")
    lengths = ir.node("Cast", [before.outputs[0]], {"to": ir.DataType.INT32}, name=f"{_PREFIX}lengths")
    longest = ir.node("ReduceMax", [summed.outputs[0]], {"keepdims": 0}, name=f"{_PREFIX}longest")
    total = ir.node("Cast", [longest.outputs[0]], {"to": ir.DataType.INT32}, name=f"{_PREFIX}total")
    nodes = [summed, before, lengths, longest, total]
    for node in nodes:
        node.outputs[0].name = f"{node.name}:0"
    graph.insert_before(graph[0], nodes)
    return lengths.outputs[0], total.outputs[0]


def _windows(config: Mapping[str, Any], layers: int) -> list[int]:
    """How many tokens each layer looks back over, itself included; -1: all."""
    width, kinds = config.get("sliding_window"), config.get("layer_types")
    if not isinstance(width, int) or not config.get("use_sliding_window", True):
        return [-1] * layers
    return [width if kinds is None or kinds[layer] == "sliding_attention" else -1 for layer in range(layers)]


def _replace(model: Any, attention: _Attention, lengths: Any, total: Any, window: int) -> None:
    """Puts a GroupQueryAttention in the place of an attention and of the cache that it gave."""
    graph = model.graph
    caches = [next(value for value in graph.inputs if value.name == f"{PAST}{attention.layer}.{side}") for side in ("key", "value")]
    _, key_heads, _, width = caches[0].shape
    wide = [attention.heads * width, key_heads * width, key_heads * width]
    nodes, flat = [], []
    for name, value, size in zip(("queries", "keys", "values"), (attention.queries, attention.keys, attention.values), wide, strict=True):
        if value.shape is not None and len(value.shape) == 3:
            flat.append(value)
            continue
        shape = _constant(model, f"{attention.layer}/{name}/shape", np.array([-1, 1, size], np.int64))
        nodes.append(ir.node("Reshape", [value, shape], name=f"{_PREFIX}{attention.layer}/{name}"))
        nodes[-1].outputs[0].name = f"{nodes[-1].name}:0"
        flat.append(nodes[-1].outputs[0])  # of one token, heads apart or side by side are the same numbers
    attributes: dict[str, Any] = {"num_heads": attention.heads, "kv_num_heads": key_heads, "scale": attention.scale,
                                  "local_window_size": window, "do_rotary": 0, "softcap": attention.softcap}
    node = ir.node("GroupQueryAttention", [*flat, *caches, lengths, total], attributes, domain="com.microsoft",
                   name=f"{_PREFIX}{attention.layer}/attention", num_outputs=3)
    nodes.append(node)
    result = node.outputs[0]
    result.name = f"{node.name}:0"
    if len(attention.output.shape) == 4:
        shape = _constant(model, f"{attention.layer}/heads/shape", np.array([-1, attention.heads, 1, width], np.int64))
        nodes.append(ir.node("Reshape", [result, shape], name=f"{_PREFIX}{attention.layer}/heads"))
        result = nodes[-1].outputs[0]
        result.name = f"{nodes[-1].name}:0"
    result.shape, result.type = attention.output.shape, attention.output.type
    graph.insert_before(attention.output.producer(), nodes)
    attention.output.replace_all_uses_with(result)
    for value, cache, side in zip(node.outputs[1:], caches, ("key", "value"), strict=True):
        place, old = next((at, output) for at, output in enumerate(graph.outputs) if output.name == f"{PRESENT}{attention.layer}.{side}")
        value.shape, value.type = cache.shape, cache.type
        old.name, value.name = f"{old.name}/grown", old.name
        graph.outputs[place] = value


def _constant(model: Any, name: str, array: np.ndarray) -> Any:
    tensor = ir.tensor(array, name=f"{_PREFIX}{name}")
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
