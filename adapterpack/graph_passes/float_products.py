"""Writes a second graph for WebAssembly from a quantized one: it reads the same codes, but dequantizes them
once when the session opens.

ONNX Runtime's WebAssembly has no fast product of codes (MatMulNBits): it dequantizes them in every pass,
which takes ten times as long as the product. ONNX Runtime folds ``DequantizeLinear`` on a constant when it
creates a session, so the download stays small and a pass is as fast as with a float graph. Formulas:
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html, blocked; and :mod:`adapterpack.onnx_graph.nbits`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from .constants import add_initializer

MOST = 2 << 30
"""Bytes of dequantized floats that fit into a browser's memory besides everything else."""
_CODES: dict[int, tuple[Any, Any]] = {
    4: (ir.DataType.UINT4, ml_dtypes.uint4),
    8: (ir.DataType.UINT8, np.uint8),
}
_OPSET = 21
"""The first opset whose ``DequantizeLinear`` has blocks."""


def write_float_products(source: Path, target: Path) -> bool:
    """Writes the graph at ``source`` to ``target``, on the same data files, with float products instead of
    products of codes.

    Returns:
        Whether it wrote the graph: it skips a graph without codes and one whose floats would be too large.
    """
    model = ir.load(source)
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits" and _readable(node)]
    floats = sum(4 * _number(node, "N") * _number(node, "K") for node in nodes)
    if not nodes or floats > MOST or model.opset_imports.get("", 0) < _OPSET:
        return False
    made: dict[str, ir.Value] = {}
    for node in nodes:
        _replace(model.graph, node, made)
    used = {value for node in model.graph.all_nodes() for value in node.inputs}
    for name, value in list(model.graph.initializers.items()):
        if value not in used and value not in model.graph.inputs and value not in model.graph.outputs:
            del model.graph.initializers[name]
    ir.save(model, target)
    return True


def _number(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].value) if name in node.attributes else {"bits": 4}.get(name, 0)


def _readable(node: ir.Node) -> bool:
    """Whether the codes are constants in rows of full blocks, in column order, with the zero points packed
    like the codes.
    """
    bits, block, columns = (_number(node, name) for name in ("bits", "block_size", "K"))
    tensors = [value if value is None else value.const_value for value in node.inputs[1:]]
    if (
        bits not in _CODES
        or not block
        or columns % block
        or len(tensors) < 2
        or tensors[0] is None
        or tensors[1] is None
    ):
        return False
    # inputs from the fifth on reorder the columns or add a bias
    if any(value is not None for value in node.inputs[4:]) or _number(node, "weight_prepacked"):
        return False
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return True
    return (
        tensors[2] is not None
        and tensors[2].dtype == ir.DataType.UINT8
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
    dtype, numpy_type = _CODES[bits]
    blocks = columns // block
    zeros = node.inputs[3] if len(node.inputs) > 3 else None
    inputs = [
        _initializer(graph, weight, dtype, (rows, columns)),
        _initializer(graph, scales, scales.const_value.dtype, (rows, blocks)),
    ]
    if zeros is not None:
        inputs.append(_initializer(graph, zeros, dtype, (rows, blocks)))
    else:
        middle = np.full((rows, blocks), 1 << (bits - 1), np.uint8).astype(numpy_type)
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
    tensor, name = value.const_value, f"{value.name}/{'x'.join(map(str, shape))}"
    if name in graph.initializers:
        return graph.initializers[name]
    if isinstance(tensor, ir.ExternalTensor):
        view: ir.TensorProtocol = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=tensor.base_dir,
        )
    else:
        view = _unpack(tensor, dtype, shape, name)
    return add_initializer(graph, view)


def _unpack(
    tensor: ir.TensorProtocol, dtype: ir.DataType, shape: tuple[int, ...], name: str
) -> ir.TensorProtocol:
    """Reinterprets a small tensor that is stored inside the graph file."""
    packed = tensor.numpy().reshape(-1)
    if dtype == ir.DataType.UINT4 and tensor.dtype == ir.DataType.UINT8:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1).astype(ml_dtypes.uint4)
    return ir.tensor(packed.reshape(shape), dtype, name=name)
