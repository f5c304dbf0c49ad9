"""Finds products of tokens with stacks of experts, and gives each expert of a stack its own matrix, so that
quantizers treat its product like any other.

A graph that torch exported keeps the experts of a layer in one constant ``[experts, in, out]``. It sorts the
pairs of a token and one of its experts by expert, splits the constant with ``Split`` and ``Squeeze`` at run
time, and joins the experts' products; or every expert multiplies all tokens. The new matrices are views of
the stack's bytes: nothing is copied until the graph is saved.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from ..onnx_graph import add_initializer, constant_input, part_of, save_graph


class ExpertProduct(NamedTuple):
    """The product of pairs of a token and an expert with a ``stack`` ``[experts, in, out]``.

    ``x`` is ``[pairs, in]``: the pairs of one expert lie together and end at ``ends`` ``[experts]``;
    ``indices`` are the places of their tokens in ``tokens`` ``[all tokens, n]``. Without ``ends``, ``x`` is
    ``[experts, all tokens, in]``.
    """

    x: ir.Value
    stack: ir.Value
    ends: ir.Value | None = None
    tokens: ir.Value | None = None
    indices: ir.Value | None = None

    @property
    def every_token(self) -> ir.SymbolicDim | int:
        """The axis of all tokens."""
        return self.x.shape[1] if self.tokens is None else self.tokens.shape[0]


def expert_product(node: ir.Node) -> ExpertProduct | None:
    """Returns the product of which ``node`` computes the result; None for any other node."""
    if node.op_type == "Concat":
        return _of_groups(node)
    if node.op_type != "MatMul" or not _is_stack(node.inputs[1]) or len(node.inputs[0].shape or ()) != 3:
        return None
    return ExpertProduct(*node.inputs)


def _is_stack(value: ir.Value) -> bool:
    return value.is_initializer() and value.shape is not None and len(value.shape) == 3


def _of_groups(node: ir.Node) -> ExpertProduct | None:
    """Returns the product whose parts, one for each expert in their order, a ``Concat`` joins."""
    found = set()
    start = None
    for number, part in enumerate(node.inputs):
        product = part.producer()
        if product is None or product.op_type != "MatMul":
            return None
        gather = product.inputs[0].producer()
        stack, place = _part(product.inputs[1])
        span = gather.inputs[1].producer() if gather is not None and gather.op_type == "Gather" else None
        if stack is None or not _is_stack(stack) or span is None or span.op_type != "Range":
            return None
        ends, last = _part(span.inputs[1])
        before = _part(span.inputs[0])
        first = constant_input(span, 0)
        if place != number or last != number or (first != 0 if start is None else before != start):
            return None
        start = ends, last
        found.add((gather.inputs[0], stack, ends))
    if len(found) != 1 or len(node.inputs) != next(iter(found))[1].shape[0]:
        return None
    x, stack, ends = found.pop()
    sources = _tokens_of(x)
    return ExpertProduct(x, stack, ends, *sources.pop()) if len(sources) == 1 else None


def _part(value: ir.Value) -> tuple[ir.Value | None, int]:
    """Returns what is split along its first axis, and which of its parts of length one the value is."""
    squeeze = value.producer()
    if squeeze is None or squeeze.op_type != "Squeeze" or squeeze.inputs[0].producer() is None:
        return None, 0
    (part, *_), split = squeeze.inputs, squeeze.inputs[0].producer()
    if split.op_type != "Split" or split.attributes.get_int("axis", 0) != 0:
        return None, 0
    return split.inputs[0], list(split.outputs).index(part)


def _tokens_of(x: ir.Value) -> set[tuple[ir.Value, ir.Value]]:
    """Returns from which tokens pairs were gathered, with the indices: ``x``, or the numbers from which it is
    computed pair by pair.
    """
    found = set()
    seen = set()
    todo = [x]
    while todo:
        value = todo.pop()
        node = value.producer()
        if node is None or value in seen:
            continue
        seen.add(value)
        if node.op_type in {"Gather", "GatherND"}:
            data, indices = node.inputs
            if data.is_initializer():
                continue
            if indices.producer() is None or indices.producer().op_type != "Range":
                found.add((data, indices))
                continue
        todo += [one for one in node.inputs if one is not None and (one.dtype or x.dtype).is_floating_point()]
    return found


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


def holds_stacks(model: ir.Model) -> bool:
    """Returns whether :func:`unstack_experts` has something to do in a graph."""
    return any(_cuts_a_stack(node) for node in model.graph)


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
    tensor = stack.const_value
    extents = tuple(stack.shape.numpy())[1:]
    for number, output in enumerate(node.outputs):
        at = tensor.nbytes // len(node.outputs) * number
        value = add_initializer(graph, part_of(tensor, f"{stack.name}/{number}", extents, at=at))
        for squeeze in [use.node for use in output.uses()]:
            squeeze.outputs[0].replace_all_uses_with(value)
            graph.remove(squeeze, safe=True)
    graph.remove(node, safe=True)
    if not stack.uses():
        graph.initializers.pop(stack.name)
