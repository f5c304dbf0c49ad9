"""Reads and sets how exactly the quantized products of a graph are computed: with float activations, or with
activations rounded to int8 in blocks; and bounds the memory that they take in a few runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from . import int8_columns
from .editing import add_initializer, part_of

PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulNBits", "MatMulBnb4", "MatMulInteger"})
"""Operators that can implement a linear layer."""
_LEVEL = "accuracy_level"
_EXACT = 0
_FAST = 4
"""The attribute of MatMulNBits that sets the accuracy, and its values."""
PACKED = 4 << 30
"""Bytes of codes up to which a few runs of a graph have them prepacked."""
_WIDEST = 1 << 26
"""The most numbers of a weight that ONNX Runtime may hold as floats while it multiplies."""


def is_fast(graph: Path | ir.Model) -> bool | None:
    """Whether the quantized products of a graph, or of that at a path, round their activations; None for a
    graph without such products.
    """
    model = graph if isinstance(graph, ir.Model) else ir.load(graph)
    fast = {node.attributes.get_int(_LEVEL, _EXACT) == _FAST for node in _products(model)}
    fast |= {node.op_type == "MatMulInteger" for node in _column_products(model)}
    return any(fast) if fast else None


def fast_products(model: ir.Model) -> list[ir.Node]:
    """Returns the ``MatMulNBits`` of a graph that round their activations."""
    return [node for node in _products(model) if node.attributes.get_int(_LEVEL, _EXACT) == _FAST]


def packs_codes(model: ir.Model) -> bool:
    """Whether a few runs of a graph have its codes prepacked: quantized products are quick with prepacked
    weights alone, but these are a second copy of the codes in memory.
    """
    held = (node.inputs[1].const_value for node in (*_products(model), *_column_products(model)))
    return bool(0 < sum(tensor.nbytes for tensor in held if tensor is not None) <= PACKED)


def divide_products(model: ir.Model) -> bool:
    """Divides wide quantized products of a graph, such as a head, into products of some of their rows each,
    on the same codes; returns whether there are any.

    ONNX Runtime holds a whole weight as floats in each run of a product that it does not prepack: of every
    exact one in 8 bits, and without prepacking of all.
    """
    wide = [node for node in _products(model) if _rows_at_once(node) < _number(node, "N")]
    for node in wide:
        _divide(node)
    return bool(wide)


def make_fast(path: Path, fast: bool = True) -> None:
    """Makes every quantized product of the graph at ``path`` round its activations to int8, or none of them;
    weights stay where they are.
    """
    model = ir.load(path)
    for node in _products(model):
        node.attributes[_LEVEL] = ir.AttrInt64(_LEVEL, _FAST if fast else _EXACT)
    other = [node for node in _column_products(model) if fast != (node.op_type == "MatMulInteger")]
    for node in other:
        (int8_columns.make_fast if fast else int8_columns.make_exact)(node)
    if other:
        RemoveUnusedNodesPass()(model)
    ir.save(model, path)


def _products(model: ir.Model) -> Iterator[ir.Node]:
    return (
        node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type == "MatMulNBits"
    )


def _column_products(model: ir.Model) -> Iterator[ir.Node]:
    return (
        node
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == "MatMulInteger" or int8_columns.codes_of(node) is not None
    )


def _number(node: ir.Node, name: str) -> int:
    return int(node.attributes.get_int(name, 0))


def _rows_at_once(node: ir.Node) -> int:
    """Returns how many rows of its weight a product may have: all, where rows are not constants that follow
    each other, or the fifth input reorders columns.
    """
    given = [value for value in node.inputs[1:] if value is not None]
    reordered = len(node.inputs) > 4 and node.inputs[4] is not None
    if reordered or _number(node, "weight_prepacked") or any(value.const_value is None for value in given):
        return _number(node, "N")
    return max(1, _WIDEST // max(1, _number(node, "K")))


def _divide(node: ir.Node) -> None:
    graph = node.graph
    rows = _number(node, "N")
    assert graph is not None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    pieces = []
    for start in range(0, rows, _rows_at_once(node)):
        count = min(_rows_at_once(node), rows - start)
        inputs = [node.inputs[0], *(_part(graph, value, rows, start, count) for value in node.inputs[1:])]
        name = f"{node.name}/{start}"
        pieces.append(ir.node(node.op_type, inputs, attributes | {"N": count}, domain=node.domain, name=name))
    joined = ir.node("Concat", [piece.outputs[0] for piece in pieces], {"axis": -1}, name=f"{node.name}/rows")
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [*pieces, joined], node.outputs, joined.outputs
    )


def _part(graph: ir.Graph, value: ir.Value | None, rows: int, start: int, count: int) -> ir.Value | None:
    """Returns ``count`` rows of an initializer that has ``rows``, from ``start`` on, on the same bytes."""
    if value is None or value.const_value is None:
        return None
    whole = value.const_value
    name = f"{value.name}/{start}"
    if name in graph.initializers:
        return graph.initializers[name]
    extents = whole.shape.numpy()
    row = whole.size // rows
    shape = (count, *extents[1:]) if extents[0] == rows else (count * row,)
    return add_initializer(graph, part_of(whole, name, shape, at=start * row * whole.dtype.bitwidth // 8))
