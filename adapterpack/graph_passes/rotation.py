"""Leaves to GroupQueryAttention what it can do itself: rotate queries and keys by their positions, and take
both and the values packed.

It counts the positions of a row from the beginning of its buffer, as the engine does. Fewer operators are a
shorter step.
"""

from __future__ import annotations

import onnx_ir as ir

_MULTIPLE = 8
"""Of what the operator wants the width of its tables to be a multiple."""
_TURNED = frozenset({"Reshape", "Transpose"})
"""What may be between a rotation and its attention."""


def rotate_in_attention(model: ir.Model) -> None:
    """Changes the attentions of a decoder's graph, in place, where rotations by a table of positions or a
    packed product come before them.

    Nodes without a use must have been removed, and what gave the rotations their tables is left without one.
    """
    positions = next((value for value in model.graph.inputs if value.name == "position_ids"), None)
    for node in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        _rotate(node, positions)
        _pack(node)


def _rotate(node: ir.Node, positions: ir.Value | None) -> None:
    rotations = [_rotation(value) for value in node.inputs[:2]]
    tables, others = (_tables(rotation, positions) for rotation in rotations)
    if tables is None or tables != others:
        return
    for rotation in filter(None, rotations):
        rotation.outputs[0].replace_all_uses_with(rotation.inputs[0])
        rotation.graph.remove(rotation, safe=True)
    node.resize_inputs(max(len(node.inputs), 9))
    for place, table in enumerate(tables, 7):
        node.replace_input_with(place, table)
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


def _rotation(value: ir.Value | None) -> ir.Node | None:
    """The RotaryEmbedding that gives a value to nothing but its attention."""
    while value is not None and len(list(value.uses())) == 1 and (node := value.producer()) is not None:
        if node.op_type == "RotaryEmbedding":
            return node
        value = node.inputs[0] if node.op_type in _TURNED else None
    return None


def _tables(rotation: ir.Node | None, positions: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The cosines and sines ``[positions, width / 2]`` that a rotation of halves has picked by position, if
    the attention takes them.
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
    """Gives an attention the product whose parts are its queries, keys and values."""
    split = node.inputs[0].producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != list(node.inputs[:3]):
        return
    if any(len(list(value.uses())) > 1 for value in split.outputs):
        return
    node.replace_input_with(0, split.inputs[0])
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)
