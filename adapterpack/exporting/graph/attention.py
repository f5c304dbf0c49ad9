"""The attention before an output projection, found in a graph: the queries that it uses, its projections, its heads and its scale.

One operator holds it (``Attention``), or a softmax over a product of queries and keys does, with factors, a cap and a mask on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import onnx_ir as ir

from ...bundle.manifest import Heads, MappedSite
from ...pack.pack import Pack
from ...slots.prompt_kv import PROJECTION
from .blocks import entering, leaving
from .sitemap import Scope

_THROUGH = frozenset({"Add", "Where", "Tanh", "Cast"})
"""What may be between a product of queries and keys and its softmax, besides factors."""


class Asked(NamedTuple):
    """The queries and keys in a graph, the factor of their products, how many heads the queries are, and how wide each is."""

    queries: Any
    keys: Any
    scale: float
    heads: int
    width: int


def with_heads(model: Any, scope: Scope, packs: Iterable[Pack], sites: Mapping[str, MappedSite]) -> dict[str, MappedSite]:
    """The sites; where packs have prompts, each output projection knows the attention before it.

    An attention of another build is left as it is: whoever asks for it says so.
    """
    wanted = {adapter.site.path for pack in packs if pack.method.kind == "attention" for adapter in pack.adapters()}
    found = dict(sites)
    for path in sorted(wanted):
        nodes = [node for node in model.graph if (own := scope(node) or "") == path or own.startswith(f"{path}.")]
        parts = [sites.get(f"{path}.{leaf}") for leaf in (PROJECTION, "k_proj", "v_proj")]
        known = next(filter(None, map(asked, nodes)), None)
        if known is None or any(part is None or part.rank != 3 for part in parts):
            continue
        out, keys, values = (part for part in parts if part is not None)
        norm = {node for node in nodes if (scope(node) or "").startswith(f"{path}.k_norm")}
        ends = tuple(value.name for side in (entering, leaving) for value in {each.name: each for each in side(norm)}.values())
        if known.heads * known.width == out.in_features and keys.out_features == values.out_features and len(ends) == (2 if norm else 0):
            shared = keys.out_features // known.width
            heads = Heads(known.queries.name, keys.output, values.output, ends or None, known.heads, shared, known.width, known.scale)
            found[out.path] = dataclasses.replace(out, heads=heads)
    return found


def asked(node: Any) -> Asked | None:
    """What a node asks, if it is an attention, or a softmax over the products of one."""
    return _of_operator(node) if node.op_type == "Attention" else _of_softmax(node) if node.op_type == "Softmax" else None


def _of_operator(node: Any) -> Asked | None:
    queries, count = node.inputs[0], node.attributes.get_int("q_num_heads", 0)
    shape = None if queries.shape is None else list(queries.shape)
    if shape is None or not isinstance(shape[-1], int):
        return None
    count, width = (count, shape[-1] // count) if len(shape) == 3 and count else (shape[1], shape[-1])
    return Asked(queries, node.inputs[1], node.attributes.get_float("scale", width**-0.5), count, width) if isinstance(count, int) else None


def _of_softmax(node: Any) -> Asked | None:
    """Back from a softmax to the product that it is over; the factors on the way multiply to the scale, a cap's cancel out."""
    product, scale = next(_products(node.inputs[0]), (None, 1.0))
    if product is None:
        return None
    queries, on_queries = _unscaled(product.inputs[0])
    keys, on_keys = _unscaled(product.inputs[1])
    shape = None if queries.shape is None else list(queries.shape)
    if shape is None or len(shape) != 4 or not (isinstance(shape[1], int) and isinstance(shape[-1], int)):
        return None
    return Asked(queries, keys, scale * on_queries * on_keys, shape[1], shape[-1])


def _products(value: Any) -> Iterator[tuple[Any, float]]:
    """The products that a value is made of, each with the factors on the way to it."""
    node = value.producer()
    if node is None:
        return
    if node.op_type == "MatMul":
        yield node, 1.0
    elif (scaled := _scaled(node)) is not None:
        yield from ((product, scaled[1] * factor) for product, factor in _products(scaled[0]))
    elif node.op_type in _THROUGH:
        for each in node.inputs:
            if each is not None:
                yield from _products(each)


def _unscaled(value: Any) -> tuple[Any, float]:
    """What a value is without the factors that it was multiplied by, and those."""
    scaled = None if value.producer() is None else _scaled(value.producer())
    if scaled is None:
        return value, 1.0
    inner, factor = _unscaled(scaled[0])
    return inner, factor * scaled[1]


def _scaled(node: Any) -> tuple[Any, float] | None:
    """What a node multiplies or divides by a number, and the factor; or None."""
    if node.op_type not in {"Mul", "Div"}:
        return None
    for place in (1, 0) if node.op_type == "Mul" else (1,):
        known = ir.convenience.get_const_tensor(node.inputs[place])
        if known is not None and known.size == 1:
            factor = float(known.numpy().reshape(()))
            return node.inputs[1 - place], factor if node.op_type == "Mul" else 1 / factor
    return None
