"""Adds the nodes that give each pair of a token and one of its experts the matrices of its adapter and its
expert.

A step has few pairs, and a prompt many with the same two, so pairs with the same adapter and expert lie
together in blocks of one length b, and each block gathers one pair of factors: b is the mean number of pairs
that have the same two, so no more than twice as many places are filled and factors gathered as there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir

from .experts import ExpertProduct

Op = Callable[..., ir.Value]
"""``op(name, *inputs)`` adds a node and returns its first output; an integer among ``inputs`` gets one axis.
"""


class PairBlocks(NamedTuple):
    """``pairs`` ``[blocks, b]``: the pair at each place, or any at a place that stays empty. ``chosen``
    ``[blocks, 2 or 1]``: adapter, if rows choose one, and expert of each block. ``places`` ``[pairs]``: the
    place of each pair.
    """

    pairs: ir.Value
    chosen: ir.Value
    places: ir.Value


def blocks_of(op: Op, product: ExpertProduct, ids: ir.Value | None, adapters: ir.Value) -> PairBlocks:
    """Adds the nodes that divide the pairs of a product into blocks. ``ids`` ``[batch]`` chooses each row's
    adapter among those on the first axis of ``adapters``.
    """
    tokens, experts = _pairs(op, product)
    pairs = op("Shape", tokens)
    at = _range_of(op, tokens)
    key = experts
    chosen = [experts]
    if ids is not None:
        every = op("Shape", product.x if product.tokens is None else product.tokens)
        wide = op("Slice", every, *((1, 2) if product.tokens is None else (0, 1)))
        own = op("Gather", ids, op("Div", tokens, op("Div", wide, op("Shape", ids))), axis=0)
        key = op("Add", op("Mul", experts, op("Shape", adapters, start=0, end=1)), own)
        chosen = [own, experts]
    ordered, order = op("TopK", key, pairs, outputs=2, axis=0, largest=0, sorted=1).producer().outputs
    begins = op("Not", op("Equal", ordered, op("Concat", -1, op("Slice", ordered, 0, -1), axis=0)))
    group = op("Sub", op("CumSum", op("Cast", begins, to=ir.DataType.INT64), 0), 1)
    starts = op("Reshape", op("NonZero", begins), -1)
    groups = op("Shape", starts)
    length = op("Div", op("Sub", op("Add", pairs, groups), 1), groups)
    sizes = op("Sub", op("Concat", op("Slice", starts, 1, _END), pairs, axis=0), starts)
    blocks = op("Div", op("Sub", op("Add", sizes, length), 1), length)
    ends = op("CumSum", blocks, 0)
    first = op("Mul", op("Sub", ends, blocks), length)
    places = op("Add", op("Gather", op("Sub", first, starts), group), at)
    room = op("Mul", op("ReduceSum", blocks, keepdims=1), length)
    filled = op("ScatterElements", op("Expand", 0, room), places, order, axis=0)
    rows = op("Reshape", filled, op("Concat", -1, length, axis=0))
    lead = op("Gather", rows, 0, axis=1)
    return PairBlocks(
        rows,
        op("Concat", *(op("Gather", one, lead) for one in chosen), axis=1),
        op("ScatterElements", op("Expand", 0, pairs), order, places, axis=0),
    )


_END = (1 << 63) - 1


def _pairs(op: Op, product: ExpertProduct) -> tuple[ir.Value, ir.Value]:
    """Returns the token and the expert of each pair, ``[pairs]``."""
    if product.ends is not None and product.indices is not None:
        tokens = op("Reshape", product.indices, -1)
        later = op("GreaterOrEqual", op("Unsqueeze", _range_of(op, tokens), 1), product.ends)
        return tokens, op("ReduceSum", op("Cast", later, to=ir.DataType.INT64), 1, keepdims=0)
    every = op("Shape", product.x, start=0, end=2)
    at = _range_of(op, op("Expand", 0, op("ReduceProd", every, keepdims=1)))
    wide = op("Slice", every, 1, 2)
    return op("Mod", at, wide), op("Div", at, wide)


def _range_of(op: Op, value: ir.Value) -> ir.Value:
    """Returns 0, 1, 2 ... for a value ``[n]``."""
    return op("Sub", op("CumSum", op("Expand", 1, op("Shape", value)), 0), 1)
