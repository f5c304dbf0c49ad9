"""Replaces the products of adapters' factors in the engine's graph by ``AddLora``, see
:mod:`adapterpack._native.row_lora`.
"""

from __future__ import annotations

import onnx_ir as ir

from .._native.row_lora import DOMAIN, OPERATOR
from .editing import add_input, inputs_of, only_reader

ROW_ADAPTERS = "row_adapters"
"""The input ``[batch]`` with the number of each row's adapter, -1 for none."""


def replace_lora(model: ir.Model) -> list[str]:
    """Replaces ``product + x @ down @ up`` wherever ``down`` and ``up`` are inputs ``[rows, ...]`` in float32
    that nothing else reads; the inputs stay, and nothing reads them any more. Returns the paths of these
    layers, each at the place that is its number.
    """
    if any(DOMAIN in one.opset_imports for one in (model, *model.functions.values())):
        return []  # what a file itself calls so is not this operator
    inputs = inputs_of(model.graph)
    layers = {
        path: nodes
        for name, down in inputs.items()
        if (path := name.removesuffix(".down")) != name
        and (nodes := _nodes(down, inputs.get(f"{path}.up"))) is not None
    }
    if layers:
        numbers = add_input(model.graph, ROW_ADAPTERS, ["batch"], ir.DataType.INT64)
        model.opset_imports[DOMAIN] = 1
        for number, nodes in enumerate(layers.values()):
            _replace(model.graph, nodes, numbers, number)
    return [*layers]


_Nodes = tuple[ir.Node, ir.Node, ir.Node]


def _nodes(down: ir.Value, up: ir.Value | None) -> _Nodes | None:
    """Returns the two products and the sum of a layer's adapter, None if the graph computes it otherwise."""
    if up is None or {down.dtype, up.dtype} != {ir.DataType.FLOAT}:
        return None
    first, second = only_reader(down), only_reader(up)
    if first is None or second is None or {first.op_type, second.op_type} != {"MatMul"}:
        return None
    hidden, change = first.outputs[0], second.outputs[0]
    third = only_reader(change)
    if (first.inputs[1], *second.inputs) != (down, hidden, up) or only_reader(hidden) is not second:
        return None
    seen = hidden.is_graph_output() or change.is_graph_output()
    return (first, second, third) if third is not None and third.op_type == "Add" and not seen else None


def _replace(graph: ir.Graph, nodes: _Nodes, numbers: ir.Value, number: int) -> None:
    first, second, third = nodes
    product = next(value for value in third.inputs if value is not second.outputs[0])
    node = ir.node(OPERATOR, [first.inputs[0], product, numbers], {"site": number}, domain=DOMAIN)
    graph.insert_before(third, node)
    old, new = third.outputs[0], node.outputs[0]
    leading = [None, None] if old.shape is None else old.shape[:2]
    width = None if second.inputs[1].shape is None else second.inputs[1].shape[2]  # which nothing infers
    new.name = old.name
    new.type = old.type
    new.shape = ir.Shape([*leading, width])
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove([third, second, first], safe=True)
