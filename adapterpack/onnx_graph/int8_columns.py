"""Products with weights in eight bits, one scale for each column: with float activations, or with activations
in eight bits, too, one scale for each row of them (W8A8).

    exact:  y = x (q_w s_w)
    fast:   y = s_x s_w (q_x q_w),  s_x = max |x| of the row / 127,  q_x = round(x / s_x)

Source: Dettmers et al. 2022, "LLM.int8()", section 2.1, vector-wise quantization. Both forms are standard
operators on the same codes; whole numbers are multiplied by ``MatMulInteger``, whose kernels for CPUs read
prompts several times as fast as float products.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .editing import add_initializer, named_node

LARGEST = 127
"""The largest code."""
_ZERO = 128
"""The code of 0 among activations: kernels are fast with unsigned ones."""
_LEAST = 1e-30
"""Takes the place of the largest activation of a row of zeros."""
_FAST = "MatMulInteger"
CODES, SCALES = "Q8", "scales"
"""What the names of codes and scales have after the weight's and an underscore."""


def scales_of(codes: str) -> str:
    """Returns the name of the scales that belong to codes, by the codes' name.

    Example:
        >>> scales_of("q_proj.weight_Q8")
        'q_proj.weight_scales'
    """
    return f"{codes.removesuffix(CODES)}{SCALES}"


def exact_nodes(
    name: str, x: ir.Value, codes: ir.Value, scales: ir.Value, dtype: ir.DataType
) -> list[ir.Node]:
    """Returns the nodes of the exact product of ``x`` with codes ``[in, out]`` and their float32 scales
    ``[out]``; the output has the type ``dtype``.
    """
    # no DequantizeLinear: ONNX Runtime makes it and the product a MatMulNBits that rounds activations
    nodes = [named_node("Cast", f"{name}/codes", codes, to=ir.DataType.FLOAT)]
    nodes.append(named_node("Mul", f"{name}/weights", *nodes[-1].outputs, scales))
    if dtype != ir.DataType.FLOAT:
        nodes.append(named_node("Cast", f"{name}/narrow_weights", *nodes[-1].outputs, to=dtype))
    return [*nodes, named_node("MatMul", name, x, *nodes[-1].outputs)]


def codes_of(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.DataType] | None:
    """Returns codes and scales of a product in its exact form, and the type in which it multiplies; None for
    any other node.
    """
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    floats = node.inputs[1].producer()
    dtype = ir.DataType.FLOAT
    if floats is not None and floats.op_type == "Cast":
        floats, dtype = floats.inputs[0].producer(), ir.DataType(floats.attributes.get_int("to"))
    wide = floats.inputs[0].producer() if floats is not None and floats.op_type == "Mul" else None
    if wide is None or wide.op_type != "Cast" or wide.inputs[0].dtype != ir.DataType.INT8:
        return None
    return wide.inputs[0], floats.inputs[1], dtype


def make_fast(node: ir.Node) -> None:
    """Replaces the exact form of a product by the fast one; the node that multiplies keeps its name."""
    found = codes_of(node)
    assert found is not None and node.graph is not None
    (codes, scales, dtype), graph = found, node.graph
    nodes = []

    def add(op: str, role: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        nodes.append(named_node(op, f"{node.name}{role}", *inputs, **attributes))
        return nodes[-1].outputs[0]

    def constant(role: str, number: object) -> ir.Value:
        name = f"int8_columns/{role}"
        if name not in graph.initializers:
            add_initializer(graph, ir.tensor(number, name=name))
        return graph.initializers[name]

    x = node.inputs[0]
    zero = constant("zero", np.uint8(_ZERO))
    if dtype != ir.DataType.FLOAT:
        x = add("Cast", "/wide", x, to=ir.DataType.FLOAT)
    largest = add(
        "ReduceMax", "/largest", add("Abs", "/size", x), constant("axis", np.array([-1])), keepdims=1
    )
    largest = add("Max", "/positive", largest, constant("least", np.float32(_LEAST)))
    step = add("Mul", "/step", largest, constant("share", np.float32(1 / LARGEST)))
    rows = add("QuantizeLinear", "/rows", add("Div", "/steps", x, step), constant("one", np.float32(1)), zero)
    product = add("Cast", "/floats", add(_FAST, "", rows, codes, zero), to=ir.DataType.FLOAT)
    y = add("Mul", "/result", add("Mul", "/columns", product, scales), step)
    if dtype != ir.DataType.FLOAT:
        y = add("Cast", "/narrow", y, to=dtype)
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, [y])


def make_exact(node: ir.Node) -> None:
    """Replaces the fast form of a product, whose ``MatMulInteger`` is ``node``, by the exact one."""
    graph = node.graph
    codes = node.inputs[1]
    dtype = ir.DataType.FLOAT
    columns = _reader(_reader(node))
    last = _reader(columns)
    x = node.inputs[0].producer().inputs[0].producer().inputs[0]
    for use in last.outputs[0].uses():
        if use.node.name == f"{node.name}/narrow":
            last = use.node
            x = x.producer().inputs[0]
            dtype = ir.DataType(last.attributes.get_int("to"))
    nodes = exact_nodes(node.name, x, codes, columns.inputs[1], dtype)
    ir.convenience.replace_nodes_and_values(graph, last, [last], nodes, last.outputs, nodes[-1].outputs)


def _reader(node: ir.Node) -> ir.Node:
    """Returns the only node that reads a node's output."""
    (use,) = node.outputs[0].uses()
    return use.node
