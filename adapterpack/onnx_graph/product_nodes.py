"""Replaces quantized products whose activations are rounded to int8 by ``QuantizedMatMul``, see
:mod:`adapterpack._native.quantized_matmul`.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from .._native.quantized_matmul import DOMAIN, OPERATOR, HeldWeight
from .products import fast_products

_BLOCKS = frozenset(2**power for power in range(4, 17))


class _Weight(NamedTuple):
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    bias: ir.Value | None
    width: int
    block: int
    bits: int


def replace_products(model: ir.Model) -> list[HeldWeight]:
    """Replaces each ``MatMulNBits`` that rounds its activations, where codes, scales and zeros are constants
    such as the operator takes, and removes those that nothing else reads. Returns the weights, which live as
    long as they are held.
    """
    if any(DOMAIN in one.opset_imports for one in (model, *model.functions.values())):
        return []  # what a file itself calls so is not this operator
    held: dict[_Weight, HeldWeight] = {}
    for node in fast_products(model):
        weight = _weight_of(node)
        if weight is None:
            continue
        if weight not in held:
            codes, scales, zeros, bias = (
                None if value is None or value.const_value is None else value.const_value.numpy()
                for value in weight[:4]
            )
            assert codes is not None and scales is not None
            held[weight] = HeldWeight(codes, scales.reshape(len(codes), -1), zeros, bias, *weight[4:])
        _replace(node, held[weight].number)
    if held:
        model.opset_imports[DOMAIN] = 1
    return [*held.values()]


def _weight_of(node: ir.Node) -> _Weight | None:
    """Returns the weight of a product, None where the operator has no such products."""
    codes, scales, zeros, order, bias = (*node.inputs[1:], None, None, None)[:5]
    width, block, bits = (node.attributes.get_int(name, 0) for name in ("K", "block_size", "bits"))
    fits = all(
        value is None or (value.const_value is not None and value.const_value.dtype == dtype)
        for value, dtype in (
            (codes, ir.DataType.UINT8),
            (scales, ir.DataType.FLOAT),
            (zeros, ir.DataType.UINT8),
            (bias, ir.DataType.FLOAT),
        )
    )
    prepacked = node.attributes.get_int("weight_prepacked", 0)
    if codes is None or scales is None or order is not None or prepacked or not fits:
        return None
    right = bits in (4, 8) and block in _BLOCKS
    return _Weight(codes, scales, zeros, bias, width, block, bits) if right else None


def _replace(node: ir.Node, number: int) -> None:
    graph, old = node.graph, node.outputs[0]
    assert graph is not None
    new = ir.node(OPERATOR, [node.inputs[0]], {"weight": number}, domain=DOMAIN, name=node.name)
    weights = [value for value in node.inputs[1:] if value is not None]
    new.outputs[0].type = old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [old], new.outputs)
    for value in weights:
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(value.name, None)
