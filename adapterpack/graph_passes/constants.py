"""Adds constants and nodes with explicit names to graphs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

PREFIX = "decoder/"
"""The prefix of the names of nodes and constants that the engine's graph adds."""


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Adds a tensor to a graph as an initializer under the tensor's own name, and returns its value."""
    value = ir.val(tensor.name, const_value=tensor)
    graph.register_initializer(value)
    return value


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """Returns the constant of that name in the engine's graph, and adds it at the first call."""
    known = model.graph.initializers.get(f"{PREFIX}{name}")
    return add_initializer(model.graph, ir.tensor(array, name=f"{PREFIX}{name}")) if known is None else known


def named_node(op: str, name: str, *inputs: ir.Value | None, **attributes: object) -> ir.Node:
    """Creates a node whose output has the node's name."""
    node = ir.node(op, list(inputs), attributes, name=name)
    node.outputs[0].name = f"{name}:0"
    return node
