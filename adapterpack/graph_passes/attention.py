"""Recognizes attention in a graph: finds the queries and keys behind the scores, the heads, the scale, and
the masks and biases added to the scores.

Attention is either one operator (``Attention``), or a softmax over a product of queries and keys with scale
factors, a cap and a mask in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import onnx_ir as ir

from ..bundle import Heads, MappedSite, SiteMap
from ..onnx_graph import constant_input
from ..pack import Pack
from ..slots import PROJECTION
from .blocks import entering, leaving
from .sites import Scope

_THROUGH = frozenset({"Add", "Where", "Max", "Tanh", "Cast", "Reshape"})
"""Operators that may come between a product of queries and keys and its softmax, besides scale factors."""


class AttentionInputs(NamedTuple):
    """The queries and keys of an attention in a graph, the scale of their products, the number of query
    heads, and the width of each.
    """

    queries: ir.Value
    keys: ir.Value
    scale: float
    heads: int
    width: int


def attention_inputs(node: ir.Node) -> AttentionInputs | None:
    """Returns the inputs of the attention that a node computes, as one operator or as the softmax over the
    scores; None for any other node.
    """
    return (
        _of_operator(node)
        if node.op_type == "Attention"
        else _of_softmax(node)
        if node.op_type == "Softmax"
        else None
    )


def _of_operator(node: ir.Node) -> AttentionInputs | None:
    queries = node.inputs[0]
    count = node.attributes.get_int("q_num_heads", 0)
    shape = [] if queries.shape is None else list(queries.shape)
    width = shape[-1] if shape else None
    if len(shape) == 3 and count:
        # an adapter's sum does not say how wide it is, where a cache of keys does
        cache = node.inputs[4] if len(node.inputs) > 4 else None
        width = width // count if isinstance(width, int) else cache and cache.shape[3]
    elif len(shape) == 4:
        count = shape[1]
    if not (isinstance(width, int) and isinstance(count, int)):
        return None
    return AttentionInputs(
        queries, node.inputs[1], node.attributes.get_float("scale", width**-0.5), count, width
    )


def _of_softmax(node: ir.Node) -> AttentionInputs | None:
    """Walks back from a softmax to the product of queries and keys. The factors on the way multiply to the
    scale; those of a cap cancel out.
    """
    product, scale = next(_products(scores_and_sinks(node)[0]), (None, 1.0))
    if product is None:
        return None
    queries, on_queries = _strip_factors(product.inputs[0])
    joined = queries.producer()
    if joined is not None and joined.op_type == "Reshape" and len(queries.shape or ()) == 3:
        # [batch * heads, tokens, width]
        queries = joined.inputs[0]
    keys, on_keys = _strip_factors(product.inputs[1])
    shape = [] if queries.shape is None else list(queries.shape)
    if len(shape) != 4 or not (isinstance(shape[1], int) and isinstance(shape[-1], int)):
        return None
    return AttentionInputs(queries, keys, scale * on_queries * on_keys, shape[1], shape[-1])


def scores_and_sinks(softmax: ir.Node) -> tuple[ir.Value, ir.Value | None]:
    """Returns the scores of a softmax, and the sinks of its heads if it has them: scores of no token, which
    take their share of the softmax.
    """
    scores = softmax.inputs[0]
    node = scores.producer()
    most = node.inputs[1].producer() if node is not None and node.op_type == "Sub" else None
    if most is not None and most.op_type == "ReduceMax" and most.inputs[0] is node.inputs[0]:
        # the largest score is subtracted, which changes nothing
        scores = node.inputs[0]
        node = scores.producer()
    if node is not None and node.op_type == "Concat" and len(node.inputs) == 2:
        return node.inputs[0], node.inputs[1]
    return scores, None


def added_to_scores(softmax: ir.Node) -> tuple[list[ir.Value], list[ir.Value]]:
    """Returns the values that are added to the scores before a softmax, masks and biases, and those that say
    which scores are kept.
    """
    added = list[ir.Value]()
    kept = []
    node = scores_and_sinks(softmax)[0].producer()
    while node is not None and node.op_type in {"Add", "Where", "Max", "Reshape"}:
        if node.op_type == "Reshape":
            node = node.inputs[0].producer()
            continue
        if node.op_type != "Add":  # the mask replaces scores; biases were added to its other input
            of = node.inputs[node.op_type == "Where" :]
            scores = next((value for value in of if any(_products(value))), None)
            if node.op_type == "Where" and scores is node.inputs[1]:
                kept.append(node.inputs[0])
            node = None if scores is None else scores.producer()
            continue
        sides = node.inputs, node.inputs[::-1]
        product, other = next((side for side in sides if any(_products(side[0]))), (None, None))
        if product is None:
            break
        added.append(other)
        node = product.producer()
    return added, kept


def _products(value: ir.Value) -> Iterator[tuple[ir.Node, float]]:
    """Yields the products that a value is computed from, each with the factors on the way."""
    node = value.producer()
    if node is None:
        return
    if node.op_type == "MatMul":
        yield node, 1.0
    elif (scaled := _split_factor(node)) is not None:
        yield from ((product, scaled[1] * factor) for product, factor in _products(scaled[0]))
    elif node.op_type in _THROUGH:
        for operand in node.inputs:
            if operand is not None:
                yield from _products(operand)


def _strip_factors(value: ir.Value) -> tuple[ir.Value, float]:
    """Returns the value before it was multiplied by constants, and the product of these constants."""
    scaled = None if value.producer() is None else _split_factor(value.producer())
    if scaled is None:
        return value, 1.0
    inner, factor = _strip_factors(scaled[0])
    return inner, factor * scaled[1]


def _split_factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Returns the input that a node multiplies or divides by a number, with the factor; None for any other
    node.
    """
    if node.op_type not in {"Mul", "Div"}:
        return None
    for place in (1, 0) if node.op_type == "Mul" else (1,):
        constant = constant_input(node, place)
        if constant is not None and constant.size == 1:
            factor = float(constant.item())
            return node.inputs[1 - place], factor if node.op_type == "Mul" else 1 / factor
    return None


def find_heads(model: ir.Model, scope: Scope, packs: Iterable[Pack], sites: SiteMap) -> dict[str, MappedSite]:
    """Returns the sites, where packs have prompts with the attention before each output projection added.

    A projection whose attention is not recognized stays as it is; it causes an error only where a pack needs
    it.
    """
    wanted = {
        adapter.site.path for pack in packs if pack.method.kind == "attention" for adapter in pack.adapters()
    }
    with_attention = dict(sites)
    for path in sorted(wanted):
        nodes = [
            node
            for node in model.graph
            if (node_path := scope(node) or "") == path or node_path.startswith(f"{path}.")
        ]
        parts = [sites.get(f"{path}.{leaf}") for leaf in (PROJECTION, "k_proj", "v_proj")]
        attention = next(filter(None, map(attention_inputs, nodes)), None)
        if attention is None or any(part is None or part.rank != 3 for part in parts):
            continue
        out, keys, values = (part for part in parts if part is not None)
        norm = {node for node in nodes if (scope(node) or "").startswith(f"{path}.k_norm")}
        ends = tuple(
            value.name
            for side in (entering, leaving)
            for value in {end.name: end for end in side(norm)}.values()
        )
        queries, _, scale, count, width = attention
        if (
            count * width == out.in_features
            and keys.out_features == values.out_features
            and len(ends) == (2 if norm else 0)
        ):
            heads = Heads(
                queries.name,
                keys.output,
                values.output,
                ends or None,
                count,
                keys.out_features // width,
                width,
                scale,
            )
            with_attention[out.path] = dataclasses.replace(out, heads=heads)
    return with_attention
