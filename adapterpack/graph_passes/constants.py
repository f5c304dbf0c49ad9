"""Puts constants and nodes with names of their own into graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

PREFIX = "decoder/"
"""What the names of nodes and constants of the engine's graph begin with."""


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Puts a tensor into a graph under the tensor's own name, and returns its value."""
    value = ir.val(tensor.name, const_value=tensor)
    graph.register_initializer(value)
    return value


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """The constant of the engine's graph that has this name, put into it once."""
    known = model.graph.initializers.get(f"{PREFIX}{name}")
    return add_initializer(model.graph, ir.tensor(array, name=f"{PREFIX}{name}")) if known is None else known


def named_node(op: str, name: str, *inputs: ir.Value | None, **attributes: object) -> ir.Node:
    """A node whose output has the node's name."""
    node = ir.node(op, list(inputs), attributes, name=name)
    node.outputs[0].name = f"{name}:0"
    return node
