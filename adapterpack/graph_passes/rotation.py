"""Moves work into GroupQueryAttention: the operator rotates queries and keys by their positions itself, and
takes queries, keys and values packed.

It counts the positions of a row from the beginning of its buffer, as the engine does. Fewer operators make a
step faster.
"""

from __future__ import annotations

import onnx_ir as ir

from ..onnx_graph import inputs_of

_MULTIPLE = 8
"""The operator requires the width of its tables to be a multiple of this."""
_TURNED = frozenset({"Reshape", "Transpose"})
"""Operators that may come between a rotation and its attention."""


def rotate_in_attention(model: ir.Model) -> None:
    """Rewrites the attentions of a decoder's graph, in place, that follow a rotation by a table of positions
    or a packed product.

    Requires: unused nodes are removed, since every use counts. An attention of another build stays as it is.
    Ensures: the graph computes the same up to rounding; nodes that looked up the tables may have no reader.
    """
    positions = inputs_of(model.graph).get("position_ids")
    for node in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        _rotate(node, positions)
        _pack(node)


def _rotate(node: ir.Node, positions: ir.Value | None) -> None:
    rotations = [_rotation(value) for value in node.inputs[:2]]
    tables, others = (_tables(rotation, positions) for rotation in rotations)
    # the operator rotates queries and keys by one pair of tables
    if tables is None or tables != others:
        return
    for rotation in filter(None, rotations):
        rotation.outputs[0].replace_all_uses_with(rotation.inputs[0])
        rotation.graph.remove(rotation, safe=True)
    # the tables are inputs 7 and 8
    node.resize_inputs(max(len(node.inputs), 9))
    for place, table in enumerate(tables, 7):
        node.replace_input_with(place, table)
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


def _rotation(value: ir.Value | None) -> ir.Node | None:
    """Returns the RotaryEmbedding that computes a value, if only its attention reads the value."""
    while value is not None and len(value.uses()) == 1 and (node := value.producer()) is not None:
        if node.op_type == "RotaryEmbedding":
            return node
        value = node.inputs[0] if node.op_type in _TURNED else None
    return None


def _tables(rotation: ir.Node | None, positions: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Returns the tables of cosines and sines ``[positions, width / 2]`` from which a rotation of halves
    reads by position, if the operator accepts them.
    """
    if (
        rotation is None
        or len(rotation.inputs) != 3
        or positions is None
        or rotation.attributes.get_int("interleaved", 0)
    ):
        return None
    picked = [value.producer() for value in rotation.inputs[1:]]
    if any(
        node is None
        or node.op_type != "Gather"
        or node.attributes.get_int("axis", 0)
        or node.inputs[1] is not positions
        for node in picked
    ):
        return None
    cosines, sines = (node.inputs[0] for node in picked)
    width = rotation.attributes.get_int("rotary_embedding_dim", 0)
    fits = all(
        table.const_value is not None
        and table.dtype == rotation.outputs[0].dtype
        and width in {0, 2 * table.shape[-1]}
        and table.shape[-1] % _MULTIPLE == 0
        for table in (cosines, sines)
    )
    return (cosines, sines) if fits else None


def _pack(node: ir.Node) -> None:
    """Feeds an attention the packed product from which its queries, keys and values were split."""
    split = node.inputs[0].producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != list(node.inputs[:3]):
        return
    # another reader still needs the parts
    if any(len(value.uses()) > 1 for value in split.outputs):
        return
    node.replace_input_with(0, split.inputs[0])
    # the operator recognizes packed queries, keys and values by missing keys and values
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)
