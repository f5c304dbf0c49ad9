"""Writes a second graph for WebAssembly from a quantized one: it reads the same codes, but dequantizes them
once when the session opens.

ONNX Runtime's WebAssembly has no fast product of codes (MatMulNBits): it dequantizes them in every pass,
which takes ten times as long as the product. ONNX Runtime folds ``DequantizeLinear`` on a constant when it
creates a session, so the download stays small and a pass is as fast as with a float graph. Formulas:
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html, blocked; and :mod:`adapterpack.onnx_graph.nbits`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..onnx_graph import add_initializer, part_of

MOST = 2 << 30
"""Bytes of dequantized floats that fit into a browser's memory besides everything else."""
_CODES = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_OPSET = 21
"""The first opset whose ``DequantizeLinear`` has blocks."""


def write_float_products(source: Path, target: Path) -> str | None:
    """Writes the graph at ``source`` to ``target``, on the same data files, with float products instead of
    products of codes.

    Requires: opset 21 or newer; codes of 4 or 8 bits in full blocks. Other products stay as they are.
    Ensures: the new graph has the same inputs, outputs and slots, and computes the same up to rounding.

    Returns:
        Why it wrote nothing, or None.
    """
    model = ir.load(source)
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits" and _readable(node)]
    floats = sum(4 * _number(node, "N") * _number(node, "K") for node in nodes)
    if not nodes:
        return "the graph has no products of codes in full blocks"
    if floats > MOST:
        return f"its weights would take {floats} bytes as floats, and a browser has room for {MOST}"
    if (opset := model.opset_imports.get("", 0)) < _OPSET:
        return f"opset {opset} has no DequantizeLinear with blocks"
    made: dict[str, ir.Value] = {}
    for node in nodes:
        _replace(model.graph, node, made)
    used = {value for node in model.graph.all_nodes() for value in node.inputs}
    for name, value in list(model.graph.initializers.items()):
        if value not in used and value not in model.graph.inputs and value not in model.graph.outputs:
            del model.graph.initializers[name]
    ir.save(model, target)
    return None


def _number(node: ir.Node, name: str) -> int:
    """Returns an attribute of a product of codes; ONNX Runtime's default of ``bits`` is 4."""
    return int(node.attributes.get_int(name, 4 if name == "bits" else 0))


def _readable(node: ir.Node) -> bool:
    """Whether the codes are constants in rows of full blocks, in column order, with the zero points packed
    like the codes.
    """
    bits, block, columns = (_number(node, name) for name in ("bits", "block_size", "K"))
    codes, scales, zeros, *others = [*list(node.inputs[1:]), None]
    if bits not in _CODES or not block or columns % block:
        return False
    if codes.const_value is None or scales.const_value is None:
        return False
    # inputs from the fifth on reorder the columns or add a bias
    if any(value is not None for value in others) or _number(node, "weight_prepacked"):
        return False
    return zeros is None or (
        zeros.const_value is not None
        and zeros.dtype == ir.DataType.UINT8
        and (columns // block) * bits % 8 == 0
    )


def _replace(graph: ir.Graph, node: ir.Node, made: dict[str, ir.Value]) -> None:
    """Replaces a product of codes by ``MatMul``; products on the same codes share their floats."""
    weight = node.inputs[1]
    if weight.name not in made:
        made[weight.name] = _floats(graph, node)
    product = ir.node("MatMul", [node.inputs[0], made[weight.name]], name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [product], node.outputs, product.outputs)


def _floats(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """Returns the dequantized weights ``[K, N]`` of a node's codes."""
    weight, scales = node.inputs[1], node.inputs[2]
    bits, block, rows, columns = (_number(node, name) for name in ("bits", "block_size", "N", "K"))
    dtype = _CODES[bits]
    blocks = columns // block
    zeros = node.inputs[3] if len(node.inputs) > 3 else None
    inputs = [
        _initializer(graph, weight, dtype, (rows, columns)),
        _initializer(graph, scales, scales.const_value.dtype, (rows, blocks)),
    ]
    if zeros is not None:
        inputs.append(_initializer(graph, zeros, dtype, (rows, blocks)))
    else:
        middle = np.full((rows, blocks), 1 << (bits - 1), np.uint8).astype(dtype.numpy())
        inputs.append(add_initializer(graph, ir.tensor(middle, dtype, name=f"{weight.name}/zeros")))
    floats = ir.node(
        "DequantizeLinear", inputs, {"axis": 1, "block_size": block}, name=f"{weight.name}/floats"
    )
    turned = ir.node("Transpose", floats.outputs, {"perm": [1, 0]}, name=f"{weight.name}/turned")
    graph.insert_before(node, [floats, turned])
    return turned.outputs[0]


def _initializer(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """Reinterprets the bytes of an initializer as another type and shape: both pack codes from the low bits
    up.
    """
    name = f"{value.name}/{'x'.join(map(str, shape))}"
    if name in graph.initializers:
        return graph.initializers[name]
    return add_initializer(graph, part_of(value.const_value, name, shape, dtype))
