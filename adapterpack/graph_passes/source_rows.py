"""Rewrites cross-attention for a pool of encoder rows: takes each row's length instead of a mask, and keys in
the layout of the pool.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..bundle import ENCODED, SOURCE_LENGTHS
from ..onnx_graph import add_input, inputs_of, named_node, only_reader
from .constants import PREFIX, NewNodes, constant

_TURNED = ("Reshape", "Transpose", "Reshape")
"""The nodes by which an exporter transposes the keys of heads, from the product backwards."""


def read_sources(model: ir.Model) -> None:
    """Rewrites how a decoder reads the encoder's output, in place.

    Requires: nothing; a decoder without an encoder, or without a mask for it, stays as it is.
    Ensures: the input ``source_lengths`` ``[batch]`` takes the place of the mask.
    """
    keys = [
        value
        for value in model.graph.inputs
        if value.name.startswith(ENCODED) and value.name.endswith(".key")
    ]
    mask = inputs_of(model.graph).get("attention_mask")
    if keys and mask is not None:
        _lengths_for_mask(model, mask, keys[0])
    for value in keys:
        _turn(model, value)


def _lengths_for_mask(model: ir.Model, mask: ir.Value, keys: ir.Value) -> None:
    """Replaces the mask ``[batch, source]`` by the input ``source_lengths`` ``[batch]``."""
    graph = model.graph
    add = NewNodes("source")
    lengths = add_input(graph, SOURCE_LENGTHS, [mask.shape[0]], ir.DataType.INT64)
    zero, one, axis = (
        constant(model, f"source/{name}", np.array(number))
        for name, number in (("zero", 0), ("one", 1), ("axis", [1]))
    )
    longest = add("Squeeze", "longest", add("Shape", "shape", keys, start=2, end=3))
    places = add("Range", "places", zero, longest, one)
    read = add("Less", "read", places, add("Unsqueeze", "column", lengths, axis))
    result = add("Cast", "mask", read, to=mask.dtype)
    result.shape, result.type = mask.shape, mask.type
    mask.replace_all_uses_with(result)
    graph.insert_before(graph[0], add.nodes)
    graph.inputs.remove(mask)


def _turn(model: ir.Model, keys: ir.Value) -> None:
    """Transposes keys in one node, which ONNX Runtime fuses into the product; an exporter's three nodes copy
    the keys in every pass.
    """
    for node in [use.node for use in keys.uses() if use.idx == 0]:
        turned = _end_of_turn(node)
        if turned is not None:
            once = named_node("Transpose", f"{PREFIX}{keys.name}/turned", keys, perm=[0, 1, 3, 2])
            model.graph.insert_before(node, once)
            turned.replace_all_uses_with(once.outputs[0])


def _end_of_turn(node: ir.Node) -> ir.Value | None:
    """Returns the value after the nodes that transpose keys, if ``node`` is the first of them; else None."""
    for op in _TURNED:
        if node.op_type != op:
            return None
        value = node.outputs[0]
        node = only_reader(value)
        if node is None:
            return None
    return value if node.op_type == "MatMul" else None
