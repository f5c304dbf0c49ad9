"""Gives each expert of a fused stack its own matrix, so that quantizers treat its product like any other.

A graph that torch exported keeps the experts of a layer in one constant ``[experts, in, out]`` and splits it
with ``Split`` and ``Squeeze`` at run time, so the products do not read constants. The new matrices are views
of the stack's bytes: nothing is copied until the graph is saved.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from ..onnx_graph.editing import add_initializer, constant_input, part_of, save_graph


def unstack_experts(path: Path) -> int:
    """Rewrites the graph at ``path`` and its data if it has such stacks; returns the number of stacks.

    Requires: nothing; a stack that anything but products of single matrices reads stays whole.
    Ensures: each such product reads a constant; the graph computes the same numbers from the same bytes.
    """
    model = ir.load(path)
    stacks = [node for node in model.graph if _cuts_a_stack(node)]
    for node in stacks:
        _unstack(model.graph, node)
    if stacks:
        with tempfile.TemporaryDirectory(prefix=".experts-", dir=path.parent) as scratch:
            save_graph(model, Path(scratch) / path.name)
            for file in (f"{path.name}.data", path.name):
                (Path(scratch) / file).replace(path.with_name(file))
    return len(stacks)


def _cuts_a_stack(node: ir.Node) -> bool:
    """Whether a node splits a constant stack into single matrices that only products read."""
    if node.op_type != "Split" or node.domain or node.attributes.get_int("axis", 0) != 0:
        return False
    stack = node.inputs[0]
    if (
        not stack.is_initializer()
        or stack.is_graph_input()
        or len(stack.shape) != 3
        or len(node.outputs) != stack.shape[0]
    ):
        return False
    return all(
        use.node.op_type == "Squeeze"
        and (axes := constant_input(use.node, 1)) is not None
        and axes.tolist() == [0]
        and all(user.node.op_type == "MatMul" and user.idx == 1 for user in use.node.outputs[0].uses())
        for output in node.outputs
        for use in output.uses()
    ) and all(not output.is_graph_output() for output in node.outputs)


def _unstack(graph: ir.Graph, node: ir.Node) -> None:
    stack = node.inputs[0]
    tensor, extents = stack.const_value, tuple(stack.shape.numpy())[1:]
    for number, output in enumerate(node.outputs):
        at = tensor.nbytes // len(node.outputs) * number
        value = add_initializer(graph, part_of(tensor, f"{stack.name}/{number}", extents, at=at))
        for squeeze in [use.node for use in output.uses()]:
            squeeze.outputs[0].replace_all_uses_with(value)
            graph.remove(squeeze, safe=True)
    graph.remove(node, safe=True)
    if not stack.uses():
        graph.initializers.pop(stack.name)
