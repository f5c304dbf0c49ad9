"""Replaces the attentions of the engine's graph by ``RaggedAttention``, see
:mod:`adapterpack._native.ragged_attention`.
"""

from __future__ import annotations

import onnx_ir as ir

from .._native.ragged_attention import DOMAIN, OPERATORS, WIDEST
from .editing import add_input

TOKEN_ROWS = "token_rows"
TOKEN_POSITIONS = "token_positions"
"""The inputs ``[tokens]`` with the row of the caches that each token of a pass belongs to, and its position
in that row.
"""
_CACHES = slice(3, 5)
_LENGTHS = slice(5, 7)
_TABLES = slice(7, 9)
_SINKS = 11
_SCALES = slice(12, 14)
_KEPT = ("num_heads", "kv_num_heads", "scale", "softcap", "local_window_size")
_PLAIN = {
    "causal": 1,
    "rotary_interleaved": 0,
    "smooth_softmax": 0,
    "qk_output": 0,
}
"""What other attributes are for this operator, and where a node lacks them."""


def replace_attention(model: ir.Model) -> bool:
    """Replaces every ``GroupQueryAttention`` of the engine's graph, and says whether it did: not if one of
    them has something that the operator lacks (a bias, a cache in float16, heads of another width), or if
    anything else reads caches or their lengths. The inputs with the lengths stay, and nothing reads them
    any more.
    """
    if any(DOMAIN in one.opset_imports for one in (model, *model.functions.values())):
        return False  # what a file itself calls so is not this operator
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    if not nodes or not all(_fits(node) for node in nodes):
        return False
    lengths = {node.inputs[_LENGTHS] for node in nodes}
    if len(lengths) > 1 or any(
        user not in nodes for pair in lengths for one in pair for user, _ in one.uses()
    ):
        return False
    rows, places = (
        add_input(model.graph, name, ["tokens"], ir.DataType.INT64) for name in (TOKEN_ROWS, TOKEN_POSITIONS)
    )
    model.opset_imports[DOMAIN] = 1
    for node in nodes:
        _replace(node, rows, places)
    return True


def _fits(node: ir.Node) -> bool:
    inputs, caches = _inputs(node), node.inputs[_CACHES]
    kinds = {side: node.attributes.get_string(f"{side}_quant_type", "NONE") for side in "kv"}
    scaled = caches[0] is not None and caches[0].dtype == ir.DataType.INT8
    return (
        all(node.attributes.get_int(name, value) == value for name, value in _PLAIN.items())
        and bool(node.attributes.get_int("do_rotary", 0)) == any(inputs[_TABLES])
        and not any(inputs[9:_SINKS])
        and set(kinds.values()) == {"PER_CHANNEL" if scaled else "NONE"}
        and node.attributes.get_int("kv_cache_bit_width", 0) == 8 * scaled
        and [one is not None for one in inputs[_SCALES]] == [scaled] * 2
        and all(node.attributes.get(name) is not None for name in _KEPT)
        and all(
            cache is not None
            and cache.is_graph_input()
            and len(cache.uses()) == 1
            and cache.dtype == (ir.DataType.INT8 if scaled else ir.DataType.FLOAT)
            and isinstance(width := cache.shape[3], int)
            and width <= WIDEST
            for cache in caches
        )
    )


def _replace(node: ir.Node, rows: ir.Value, places: ir.Value) -> None:
    inputs, caches = _inputs(node), node.inputs[_CACHES]
    scales = [one for one in inputs[_SCALES] if one is not None]
    made = ir.node(
        OPERATORS[bool(scales)],
        [*inputs[:3], *caches, rows, places, *inputs[_TABLES], inputs[_SINKS], *scales],
        {name: node.attributes[name] for name in _KEPT},
        domain=DOMAIN,
        name=node.name,
        num_outputs=len(node.outputs),
    )
    node.graph.insert_before(node, made)
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    for cache in (*caches, *made.outputs[1:]):
        cache.shape = ir.Shape(["cached_rows", *cache.shape[1:]])
    node.graph.remove(node, safe=True)


def _inputs(node: ir.Node) -> list[ir.Value | None]:
    return [*node.inputs, *[None] * (_SCALES.stop - len(node.inputs))]
