"""Gives each expert of a fused stack its own matrix, so that quantizers treat its product like any other.

A graph that torch exported keeps the experts of a layer in one constant ``[experts, in, out]`` and splits it
with ``Split`` and ``Squeeze`` at run time, so the products do not read constants. The new matrices are views
of the stack's bytes: nothing is copied until the graph is saved.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..onnx_graph.save import save_graph
from .constants import add_initializer


def unstack_experts(path: Path) -> int:
    """Rewrites the graph at ``path`` and its data if it has such stacks; returns the number of stacks."""
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
        and _first_axis(use.node)
        and all(user.node.op_type == "MatMul" and user.idx == 1 for user in use.node.outputs[0].uses())
        for output in node.outputs
        for use in output.uses()
    ) and all(not output.is_graph_output() for output in node.outputs)


def _first_axis(squeeze: ir.Node) -> bool:
    axes = (
        squeeze.inputs[1].const_value if len(squeeze.inputs) > 1 and squeeze.inputs[1] is not None else None
    )
    return axes is not None and axes.numpy().tolist() == [0]


def _unstack(graph: ir.Graph, node: ir.Node) -> None:
    stack = node.inputs[0]
    for output, matrix in zip(list(node.outputs), _matrices(stack.const_value), strict=True):
        value = add_initializer(graph, matrix)
        for squeeze in [use.node for use in output.uses()]:
            squeeze.outputs[0].replace_all_uses_with(value)
            graph.remove(squeeze, safe=True)
    graph.remove(node, safe=True)
    if not stack.uses():
        graph.initializers.pop(stack.name)


def _matrices(stack: ir.TensorProtocol) -> Iterator[ir.TensorProtocol]:
    """Yields the matrices of a stack, in order."""
    count, *extents = stack.shape.numpy()
    for number in range(count):
        name, shape = f"{stack.name}/{number}", ir.Shape(extents)
        if isinstance(stack, ir.ExternalTensor):
            length = (stack.length or stack.nbytes) // count
            yield ir.ExternalTensor(
                stack.location,
                (stack.offset or 0) + number * length,
                length,
                stack.dtype,
                shape=shape,
                name=name,
                base_dir=stack.base_dir,
            )
        else:
            yield ir.tensor(np.ascontiguousarray(stack.numpy()[number]), name=name)
