"""Lets the nodes of an ordinary graph work on static caches: attention of any build, indexers that select
keys, masks that depend on what the tokens say.

The ordinary graph has rows that end together, with padding before the shorter ones. So a pass reads what each
row has in its cache as such a past, under a mask of the padding, and writes its new positions behind the
row's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..bundle import PAST, PRESENT
from ..onnx_graph import take_output
from .constants import NewNodes, constant


class PastRows:
    """The rows of one graph, which it rewires in place. ``ids`` are the tokens of a pass ``[batch,
    sequence]``, ``lengths`` the last position of each row's cache after it ``[batch]``, and ``total`` the
    length of the longest row.
    """

    def __init__(self, model: ir.Model, ids: ir.Value, lengths: ir.Value, total: ir.Value) -> None:
        self._model, self._add = model, (add := NewNodes("past"))
        self._biases: dict[str, ir.Value] = {}
        zero = self._number(0)
        one = self._number(1)
        self._heads = self._number([1])
        start = self._number([0])
        stop = self._number([np.iinfo(np.int64).max])
        longest, last = (
            add("Cast", f"{value.name}/whole", value, to=ir.DataType.INT64) for value in (total, lengths)
        )
        self._tokens = add("Neg", "tokens", add("Shape", "sequence", ids, start=1, end=2))
        self._length = add("Add", "length", longest, self._tokens)
        end = add("Sub", "end", longest, one)
        padding = add("Unsqueeze", "padding", add("Sub", "missing", end, last), self._heads)
        keys = add("Range", "keys", zero, longest, one)
        # [batch, total]: the position of each key in its row, negative in the padding
        places = add("Sub", "places", keys, padding)
        self._real = add("GreaterOrEqual", "real", places, zero)
        # padding reads the first position of its row, which nothing sees
        read = add("Max", "read", self._cut(places, "past", start, self._tokens), zero)
        written = self._cut(places, "new", self._tokens, stop)
        self._read, self._written = (
            add("Unsqueeze", f"{value.name}/index", value, self._number([1, 3])) for value in (read, written)
        )
        # the opposite: where the positions of each row are among the keys, all of which the row may not have
        found = add("Min", "found", add("Add", "moved", keys, padding), end)
        self._found = add("Unsqueeze", "found/index", found, self._number([1, 2]))

    def count(self, cache: ir.Value) -> None:
        """Lets nodes that read the length of a cache read that of the longest past."""
        axis = len(cache.shape) - 2
        for node in [use.node for use in cache.uses() if _extents(use.node) == (axis, axis + 1)]:
            node.outputs[0].replace_all_uses_with(self._length)
            self._model.graph.remove(node, safe=True)

    def reads(self, cache: ir.Value) -> list[ir.Usage]:
        """Returns the uses of a cache by nodes that do not know how long its rows are: any but
        GroupQueryAttention and the number of rows.
        """
        return [
            use
            for use in cache.uses()
            if use.node.op_type != "GroupQueryAttention" and not counts_rows(use.node)
        ]

    def keep(self, cache: ir.Value) -> None:
        """Gives those nodes the past of each row, and unless GroupQueryAttention does so, writes what they
        append into the cache; one without an axis of heads gets one.
        """
        add = self._add
        name = cache.name
        uses = self.reads(cache)
        if not uses:
            return
        shape = cache.shape
        graph = self._model.graph
        axis = len(shape) - 2
        if flat := axis == 1:
            cache.shape = ir.Shape([shape[0], 1, *shape[1:]])
        heads = self._number([1, cache.shape[1], 1, 1])
        past = add("GatherND", name, cache, add("Expand", f"{name}/index", self._read, heads), batch_dims=2)
        past = add("Squeeze", f"{name}/flat", past, self._heads) if flat else past
        past.shape = shape
        past.type = cache.type
        for node, place in uses:
            node.replace_input_with(place, past)
        output = PRESENT + name.removeprefix(PAST)
        grown = next(value for value in graph.outputs if value.name == output)
        if grown.producer().op_type == "GroupQueryAttention":
            return
        new = self._cut(grown, output, self._tokens, self._number([np.iinfo(np.int64).max]), axis)
        new = add("Unsqueeze", f"{output}/heads", new, self._heads) if flat else new
        places = add("Expand", f"{output}/index", self._written, add("Shape", f"{output}/shape", new))
        kept = add("ScatterElements", f"{output}/kept", cache, places, new, axis=2)
        kept.shape, kept.type = cache.shape, cache.type
        take_output(graph, grown, kept, "/grown")

    def by_row(self, added: Sequence[ir.Value]) -> ir.Value:
        """Returns the sum of values ``added`` to scores ``[batch, heads, sequence, total]``, with the keys of
        each row from the beginning of its cache on.
        """
        add = self._add
        name = "+".join(value.name for value in added)
        if name not in self._biases:
            total = added[0]
            for other in added[1:]:
                total = add("Add", f"{total.name}/{other.name}", total, other)
            keys = add("Expand", f"{name}/keys", self._found, add("Shape", f"{name}/shape", total))
            self._biases[name] = add("GatherElements", f"{name}/by_row", total, keys, axis=3)
        return self._biases[name]

    def hide(self, mask: ir.Value) -> None:
        """Computes a graph's mask ``[batch, total]``, which hides the padding."""
        real = self._add("Cast", "mask", self._real, to=mask.dtype)
        real.shape, real.type = mask.shape, mask.type
        mask.replace_all_uses_with(real)

    def insert(self) -> None:
        """Inserts the nodes into the graph, where unused ones do no harm until they are removed."""
        self._model.graph.extend(self._add.nodes)
        self._model.graph.sort()

    def _cut(self, value: ir.Value, name: str, start: ir.Value, stop: ir.Value, axis: int = 1) -> ir.Value:
        return self._add("Slice", f"{name}/cut", value, start, stop, self._number([axis]))

    def _number(self, number: int | list[int]) -> ir.Value:
        return constant(self._model, f"past/{number}", np.array(number))


def counts_rows(node: ir.Node) -> bool:
    """Whether a node reads only the number of rows of a cache or a mask."""
    return _extents(node) == (0, 1)


def _extents(node: ir.Node) -> tuple[int, int] | None:
    """Returns which extents of a value a node reads, from the first to before the last; None if it reads the
    value itself.
    """
    bounds = (node.attributes.get_int("start", 0), node.attributes.get_int("end", 1 << 31))
    return bounds if node.op_type == "Shape" else None
