"""Reads ONNX files that users already have: finds the linear modules of a checkpoint by the bytes of their
weights.

Reverses an exporter's rewrites around each node, so that the rest of export sees one MatMul for each module:
it splits packed weights, and transposes once and for all the weights that a node would transpose at run time.
A later pass packs siblings again, with their adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...adapter_methods import LAYOUTS
from ...base import Checkpoint
from ...bundle import PAST
from ...errors import FormatError, Unsupported
from ...graph_passes import with_bias
from ...io import Config
from ...onnx_graph import (
    GraphFile,
    TensorPlace,
    WeightPiece,
    add_initializer,
    inputs_of,
    require_openable,
    require_safe,
)
from ...onnx_graph.match import match
from ...pack import Pack
from ...slots import DEFAULT
from ...tasks import AXES
from .base import FRONTENDS, BaseGraph, ExportSource, Frontend

_OPSET = 17
"""The first opset that has every operator of an adapter's branches."""


class _Part(NamedTuple):
    """The output features from ``at`` on that belong to one module of a packed weight."""

    at: int
    width: int
    path: str


def _build(source: ExportSource) -> BaseGraph:
    """Returns the graph of the source's file, with a separate node for each module that the packs change."""
    path = source.file
    base = Checkpoint(source.folder)
    assert path is not None, "the frontend supports sources with a file only"
    graph = GraphFile(path)
    data = require_safe(graph)
    wanted = _find_weights(base, source.packs)
    places = match(graph, base, {tensor: kind for tensor, (kind, _) in wanted.items()})
    require_openable(path, {path, *data})
    model = ir.load(path)
    _require_float(model, path, source.dtype)
    _name_inputs(model, base)
    owners: dict[ir.Node, str] = {}
    parts: dict[tuple[str, bool], list[_Part]] = {}
    for tensor, place in places.items():
        piece = _piece(model, place, path)
        part = _Part(piece.at, piece.stop - piece.start, wanted[tensor][1])
        parts.setdefault((piece.initializer, piece.transposed), []).append(part)
    for (name, transposed), modules in parts.items():
        owners |= _separate_modules(model, name, transposed, sorted(modules), path)
    producer = " ".join(filter(None, (model.producer_name, model.producer_version))) or "unknown"
    return BaseGraph(model, owners.get, f"external, by {producer[:150]}", ("left", "right"))


def _find_weights(base: Checkpoint, packs: Iterable[Pack]) -> dict[str, tuple[str, str]]:
    """Maps the weight of every module of the packs to the kind and the path of its site."""
    wanted = {}
    for group in (group for pack in packs if pack.method.kind != "prompt" for group in pack.groups):
        kind = group.kind if group.role == "adapter" else "linear"
        if group.role == "adapter" and not LAYOUTS[kind].linear:
            raise Unsupported(
                "a graph has slots at linear layers only",
                where=group.path,
                found=kind,
                remedy="export with --mode folded",
            )
        wanted[base.require_weight(group.path, group.weight)] = kind, group.path
    return wanted


def _piece(model: ir.Model, place: TensorPlace, where: Path) -> WeightPiece:
    """Returns the one piece of an initializer that a linear node reads; a tied weight may have other places
    too.
    """
    whole = max(piece.stop for piece in place.pieces[0])
    fitting = [
        piece
        for piece in place.pieces[0]
        if piece.axis == 0
        and piece.slot is None
        and piece.nbits is None
        and (piece.start, piece.stop) == (0, whole)
        and _nodes(model, piece.initializer, piece.transposed)
    ]
    if len(place.pieces) != 1 or not fitting:
        raise Unsupported(
            "no MatMul of the graph reads this weight as it is",
            where=f"{where}, {place.tensor}",
            found="; ".join(f"{piece.initializer}: {piece.layout}" for piece in place.pieces[0])[:300],
            remedy="attach to the float graph and quantize the bundle, or export with --mode folded",
        )
    return fitting[0]


def _nodes(model: ir.Model, name: str, transposed: bool) -> list[ir.Node]:
    """Returns the nodes that multiply by an initializer, whose columns are their output features, or its rows
    if it is not ``transposed``.
    """
    readers = []
    for node, index in model.graph.initializers[name].uses():
        if node.op_type == "Transpose":
            products = [user for user, place in node.outputs[0].uses() if place == 1]
            readers += [user for user in products if user.op_type == "MatMul" and not transposed]
        elif index == 1 and node.op_type in {"MatMul", "Gemm"}:
            by_row = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
            readers += [node] if by_row is not transposed else []
    return readers


def _separate_modules(
    model: ir.Model, name: str, transposed: bool, modules: Sequence[_Part], where: Path
) -> dict[ir.Node, str]:
    """Replaces one MatMul by a MatMul for each module, in place, and returns the nodes with their paths."""
    value = model.graph.initializers[name]
    readers = _nodes(model, name, transposed)
    if len(readers) != 1:
        raise Unsupported(
            "several nodes multiply by this weight, and a slot could not tell them apart",
            where=f"{where}, {name}",
            found=", ".join(node.name for node in readers)[:200],
        )
    (node,) = readers
    total = value.shape[1] if transposed else value.shape[0]
    if len(modules) == 1 and modules[0].width == total and node.inputs[1] is value:
        node.name = node.name or f"{modules[0].path}/{node.op_type}"
        return {node: modules[0].path}
    if node.op_type != "MatMul":
        raise Unsupported(
            "a packed weight is read by another operator than MatMul",
            where=f"{where}, {name}",
            found=node.op_type,
            remedy="export with --mode folded",
        )
    last, bias = with_bias(node.outputs[0], total)
    outputs = []
    branches = {}
    for part in _fill_gaps(modules, total, name):
        branch, end = _linear(model, node, part, value.const_value, transposed, bias)
        outputs.append(end)
        branches[branch] = part.path
    joined = outputs[0]
    if len(outputs) > 1:
        concat = ir.node("Concat", outputs, {"axis": -1}, name=f"{node.name or name}/joined")
        joined = concat.outputs[0]
        model.graph.insert_before(node, concat)
    joined.shape, joined.type = last.shape, last.type
    was = last.name
    last.name = f"{last.name}/packed"
    joined.name = was
    last.replace_all_uses_with(joined, replace_graph_outputs=True)
    gone = [last.producer()] if last.producer() is not node else []
    model.graph.remove([*gone, node], safe=True)
    return branches


def _fill_gaps(modules: Sequence[_Part], total: int, name: str) -> list[_Part]:
    """Returns the parts, with the remaining output features as parts that no pack changes."""
    parts = []
    at = 0
    for part in (*modules, _Part(total, 0, "")):
        if part.at > at:
            parts.append(_Part(at, part.at - at, f"{name}[{at}:{part.at}]"))
        if part.width:
            parts.append(part)
        at = max(at, part.at + part.width)
    return parts


def _linear(
    model: ir.Model,
    old: ir.Node,
    part: _Part,
    packed: ir.TensorProtocol,
    transposed: bool,
    bias: ir.Value | None,
) -> tuple[ir.Node, ir.Value]:
    """Adds a MatMul, and an Add if there is a bias, for one part of a packed weight; returns the node and the
    final value.
    """
    features = slice(part.at, part.at + part.width)
    x = old.inputs[0]

    def weight_of() -> np.ndarray:
        """Reads the output features of the part as ``[in, out]``, only when they are written."""
        numbers = packed.numpy()
        return np.ascontiguousarray(numbers[:, features] if transposed else numbers[features].T)

    weight = _initializer(model, f"{part.path}.weight_t", weight_of, (x.shape[-1], part.width))
    node = ir.node("MatMul", [x, weight], name=f"{part.path}/MatMul")
    nodes = [node]
    end = node.outputs[0]
    shape = ir.Shape([*list(x.shape)[:-1], part.width])
    end.name = f"{part.path}/product"
    end.shape = shape
    end.type = x.type
    if bias is not None:
        own = bias.const_value.numpy()[features]
        added = _initializer(model, f"{part.path}.bias_", lambda: np.ascontiguousarray(own), own.shape)
        plus = ir.node("Add", [end, added], name=f"{part.path}/Add")
        end = plus.outputs[0]
        end.name = f"{part.path}/output"
        end.shape = ir.Shape(list(shape))
        end.type = x.type
        nodes.append(plus)
    model.graph.insert_before(old, nodes)
    return node, end


def _initializer(
    model: ir.Model, name: str, numbers: Callable[[], np.ndarray], shape: tuple[int, ...]
) -> ir.Value:
    tensor = ir.LazyTensor(lambda: ir.tensor(numbers()), ir.DataType.FLOAT, ir.Shape(shape), name=name)
    return add_initializer(model.graph, tensor)


def _require_float(model: ir.Model, path: Path, dtype: str) -> None:
    """Checks that the graph computes in a float type that slots can have."""
    halves = sorted(
        {value.dtype.name for value in model.graph.initializers.values() if value.dtype in _HALVES}
    )
    if halves:
        raise Unsupported(
            "slots are float32, and this graph computes in another type",
            where=path,
            found=", ".join(halves),
            remedy="export the graph in float32, and quantize the bundle",
        )
    if dtype != DEFAULT:
        raise Unsupported(
            "an ONNX file keeps the float type that it was made in",
            where=path,
            expected=DEFAULT,
            found=dtype,
            remedy="leave --dtype out",
        )
    opset = model.opset_imports.get("", 0)
    if opset < _OPSET:
        raise Unsupported(
            "the graph's operators are too old",
            where=path,
            expected=f"opset {_OPSET} or newer",
            found=opset,
            remedy="convert it with onnx.version_converter, or export it again",
        )
    model.ir_version = max(model.ir_version, 8)


_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def _name_inputs(model: ir.Model, base: Checkpoint) -> None:
    """Removes weights from the inputs, where old exporters list them, and sets the cache's extents from the
    model's config.
    """
    model.graph.inputs[:] = [
        value
        for value in model.graph.inputs
        if value.name not in model.graph.initializers or value.name in AXES
    ]
    inputs = inputs_of(model.graph)
    if "input_ids" not in inputs:
        raise FormatError(
            "the graph has no input of the name input_ids",
            found=", ".join(list(inputs)[:8]),
            remedy="rename its inputs and outputs as Hugging Face's optimum does",
        )
    config: Config = base.config
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    width = config.get("head_dim") or (config.get("hidden_size") or config.get("n_embd") or 0) // heads
    for name, value in inputs.items():
        if name.startswith(PAST) and value.shape is not None and not isinstance(value.shape[3], int):
            value.shape = ir.Shape([*list(value.shape)[:3], width])
    if inputs["input_ids"].shape is None or any(
        value.shape is None for node in model.graph for value in node.outputs if node.op_type == "MatMul"
    ):
        # most graphs declare their shapes
        from onnx_ir.passes.common import ShapeInferencePass  # noqa: PLC0415

        ShapeInferencePass()(model)


external = FRONTENDS.register(Frontend("external", lambda source: source.file is not None, _build))
