"""Names, constants and lists of nodes of the engine's graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..onnx_graph import add_initializer, named_node

PREFIX = "decoder/"
"""The prefix of the names of nodes and constants that the engine's graph adds."""


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """Returns the constant of that name in the engine's graph, and adds it at the first call."""
    known = model.graph.initializers.get(f"{PREFIX}{name}")
    return add_initializer(model.graph, ir.tensor(array, name=f"{PREFIX}{name}")) if known is None else known


class NewNodes:
    """Collects nodes whose names begin with a prefix, in order, until they are inserted into a graph."""

    def __init__(self, prefix: str) -> None:
        self.prefix = f"{PREFIX}{prefix}/"
        self.nodes: list[ir.Node] = []

    def __call__(self, op: str, name: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        """Adds a node and returns its output."""
        self.nodes.append(named_node(op, f"{self.prefix}{name}", *inputs, **attributes))
        return self.nodes[-1].outputs[0]
