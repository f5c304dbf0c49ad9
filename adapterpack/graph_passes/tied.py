"""Shares one quantized table between an embedding and the product with its transpose that computes the
logits.

GatherBlockQuantized reads codes ``[entries, width]`` where MatMulNBits reads them ``[entries, blocks, bytes
of a block]``: the same bytes in the same order, with the same scales and zero points. Two initializers of
these shapes refer to the same bytes of the data file.

Operator:
com.microsoft.GatherBlockQuantized in ONNX Runtime's docs/ContribOperators.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..onnx_graph import add_initializer, part_of

TABLE = "/table"
"""The suffix for the name of codes in their other shape."""


def look_up_codes(table: ir.Value, product: ir.Node) -> None:
    """Makes the lookups in a float ``table`` read the codes of the product on it, if lookups are its only
    readers; the lookups keep their names.

    Until :func:`share_bytes` rewrites the file, a ``Reshape`` gives the codes their other shape.

    Requires: nothing; a table that other nodes read stays float, and so does one whose width is not a
    multiple of the block, since its rows of codes are padded.
    Ensures: no node reads the float table any more, if its lookups read the codes.
    """
    readers = [use.node for use in table.uses()]
    width, block = (product.attributes.get_int(name) for name in ("K", "block_size"))
    if width % block or any(not _looks_up(node, table) for node in readers) or not readers:
        return
    codes, *grid = product.inputs[1:4]
    graph = table.graph
    shape = ir.tensor(np.array([0, -1], np.int64), name=f"{codes.name}{TABLE}/shape")
    view = ir.node("Reshape", [codes, add_initializer(graph, shape)], name=f"{codes.name}{TABLE}")
    view.outputs[0].name = view.name
    # first in the graph, since lookups may be anywhere
    graph.insert_before(graph[0], view)
    for node in readers:
        attributes = {
            "bits": product.attributes.get_int("bits"),
            "block_size": block,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        lookup = ir.node(
            "GatherBlockQuantized",
            [view.outputs[0], node.inputs[1], *grid],
            attributes,
            domain="com.microsoft",
            name=node.name,
        )
        ir.convenience.replace_nodes_and_values(
            node.graph, node, [node], [lookup], node.outputs, lookup.outputs
        )


def share_bytes(path: Path) -> None:
    """Replaces, in the graph at ``path``, the reshaped codes by an initializer that refers to the same bytes
    of the data file.

    Requires: nothing; a graph that :func:`look_up_codes` has not changed stays as it is.
    Ensures: lookups and product read the same bytes.
    """
    model = ir.load(path)
    views = [node for node in model.graph if node.op_type == "Reshape" and (node.name or "").endswith(TABLE)]
    for node in views:
        codes, extents = node.inputs
        shape = (codes.shape[0], codes.const_value.size // codes.shape[0])
        table = ir.val(node.outputs[0].name, const_value=part_of(codes.const_value, node.name, shape))
        node.outputs[0].replace_all_uses_with(table)
        node.outputs[0].name = f"{table.name}/made"
        model.graph.remove(node, safe=True)
        model.graph.initializers.pop(extents.name)
        model.graph.register_initializer(table)
    if views:
        ir.save(model, path)


def _looks_up(node: ir.Node, table: ir.Value) -> bool:
    return node.op_type == "Gather" and node.inputs[0] is table and node.attributes.get_int("axis", 0) == 0
