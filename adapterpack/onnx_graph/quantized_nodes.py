"""Replaces quantized products whose activations are rounded to int8 by ``QuantizedMatMul``, see
:mod:`adapterpack._native.quantized_matmul`.
"""

from __future__ import annotations

import onnx_ir as ir

from .._native.quantized_matmul import DOMAIN, OPERATOR, HeldWeight
from .products import fast_products

_BLOCKS = frozenset(2**power for power in range(4, 17))


def replace_products(model: ir.Model) -> list[HeldWeight]:
    """Replaces each ``MatMulNBits`` that rounds its activations, where codes, scales and zeros are constants
    such as the operator takes, and removes those that nothing else reads. Returns the weights, which live as
    long as they are held.
    """
    if any(DOMAIN in one.opset_imports for one in (model, *model.functions.values())):
        return []  # what a file itself calls so is not this operator
    held: dict[tuple[ir.Value | int | None, ...], HeldWeight] = {}
    for node in fast_products(model):
        key = _weight_of(node)
        if key is None:
            continue
        if key not in held:
            held[key] = _held(node)
        _replace(node, held[key].number)
    if held:
        model.opset_imports[DOMAIN] = 1
    return [*held.values()]


def _weight_of(node: ir.Node) -> tuple[ir.Value | int | None, ...] | None:
    """Returns what makes a product's weight, None where the operator has no such products."""
    codes, scales, zeros, order, bias = (*node.inputs[1:], None, None, None)[:5]
    numbers = tuple(node.attributes.get_int(name, 0) for name in ("K", "N", "bits", "block_size"))
    given = {codes: ir.DataType.UINT8, scales: ir.DataType.FLOAT, zeros: ir.DataType.UINT8, bias: ir.DataType.FLOAT}
    fits = all(
        value is None or (value.const_value is not None and value.const_value.dtype == dtype)
        for value, dtype in given.items()
    )
    prepacked = node.attributes.get_int("weight_prepacked", 0)
    right = codes is not None and scales is not None and order is None and not prepacked
    if not (fits and right and numbers[2] in (4, 8) and numbers[3] in _BLOCKS):
        return None
    return (codes, scales, zeros, bias, *numbers)


def _held(node: ir.Node) -> HeldWeight:
    codes, scales, zeros, _, bias = (*node.inputs[1:], None, None, None)[:5]
    width, out, bits, block = (node.attributes.get_int(name, 0) for name in ("K", "N", "bits", "block_size"))
    arrays = [None if value is None else value.const_value.numpy() for value in (codes, scales, zeros, bias)]
    return HeldWeight(
        arrays[0], arrays[1].reshape(out, -1), arrays[2], arrays[3], width, block, bits
    )


def _replace(node: ir.Node, number: int) -> None:
    graph, old = node.graph, node.outputs[0]
    assert graph is not None
    new = ir.node(OPERATOR, [node.inputs[0]], {"weight": number}, domain=DOMAIN, name=node.name)
    weights = [value for value in node.inputs[1:] if value is not None]
    new.outputs[0].type = old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [old], new.outputs)
    for value in weights:
        if not value.uses() and not value.is_graph_output() and value.name in graph.initializers:
            graph.initializers.pop(value.name)
