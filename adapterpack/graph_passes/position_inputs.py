"""Replaces positions that a graph counts by the length of its cache with each row's own ``position_ids``.

Graphs use positions in two places: as indexes into tables of positions, and in biases of attention scores by
distance (T5's buckets). Both depend on positions alone, so this module runs these parts of the graph
separately to find out what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from ..errors import Unsupported
from ..onnx_graph.editing import add_input, inputs_of, named_node
from ..onnx_graph.float32_form import in_float32
from .constants import PREFIX, constant

_FARTHEST = 4096
"""The largest distance to test; a bias must be constant from some smaller distance on."""
_TRIALS = ((3, 5), (2, 0), (1, 9))
"""Pairs of (tokens in the pass, tokens in the cache before them) for which parts of the graph are run."""
_TOKEN = 5
"""The first id of test tokens; none of them is padding."""
_MASKED = -1e4
"""A score below this hides a token; half precision uses -65504."""

_SHAPING = frozenset({"Expand", "Reshape", "Unsqueeze", "Squeeze", "Identity"})
_OF_EACH = frozenset(
    {"Add", "Sub", "Mul", "Div", "Floor", "Log", "Exp", "Pow", "Sqrt", "Cast", "Max", "Min", "Clip"}
)
"""Operators that only change the shape of their input (``_SHAPING``), and operators that compute each number
from the same number of each input (``_OF_EACH``).
"""


class PositionInputs:
    """Rewires one graph in place; ``past`` are its cache inputs, ``ids`` its tokens ``[batch, sequence]``."""

    def __init__(
        self, model: ir.Model, ids: ir.Value, past: Sequence[ir.Value], total: ir.Value | None
    ) -> None:
        self.model, self._ids, self._past, self._total = model, ids, past, total
        self._biases: dict[str, list[ir.Value]] = {}

    def bias(self, added: Sequence[ir.Value], attention: ir.Node) -> list[ir.Value]:
        """Returns the values ``added`` to the scores of an ``attention`` (its last node) as one bias
        ``[batch, heads, sequence, total]`` for rows of different lengths. Returns nothing if they only hide
        later tokens. Leaves out values that depend on the tokens of a row, which are masks.

        Raises:
            Unsupported: the bias depends on more than the distance between tokens.
        """
        terms = [value for value in added if self._positional(value)]
        name = "+".join(value.name for value in terms)
        if terms and name not in self._biases:
            value = terms[0]
            for other in terms[1:]:
                value = self._add(attention, "Add", f"{value.name}/sum", value, other)
            table = self._by_distance(value)
            self._biases[name] = [] if table is None else [self._look_up(table, value)]
        return self._biases.get(name, [])

    def within_chunks(
        self, size: int, bias: Sequence[ir.Value], queries: ir.Value, attention: ir.Node
    ) -> list[ir.Value]:
        """Extends a ``bias`` so that tokens see only their own chunk of ``size`` tokens: ``[batch, 1,
        sequence, total]`` of the type of ``queries``.
        """
        dtype, name = queries.dtype or ir.DataType.FLOAT, f"chunks/{size}"
        add = partial(self._add, attention)
        if name not in self._biases:
            lowest = np.float32(-1e4 if dtype == ir.DataType.FLOAT16 else -1e9)
            number, zero, one = (
                self._number(f"{name}/{key}", value)
                for key, value in (("size", size), ("zero", 0), ("one", 1))
            )
            keys = add("Div", f"{name}/of_keys", self._keys(attention, name, zero, one), number)
            rows = add("Div", f"{name}/of_queries", self._queries(attention, name), number)
            own = add("Equal", f"{name}/own", rows, keys)
            none, hidden = (
                self._number(f"{name}/{key}", value)
                for key, value in (("none", np.float32(0)), ("hidden", lowest))
            )
            shown = add("Where", f"{name}/shown", own, none, hidden)
            heads = add("Unsqueeze", f"{name}/heads", shown, self._number("second_axis", [1]))
            self._biases[name] = [add("Cast", name, heads, to=dtype)]
        (chunks,) = self._biases[name]
        return [add("Add", f"{name}/bias", *bias, chunks)] if bias else [chunks]

    def index_tables(self) -> None:
        """Makes position tables read ``position_ids`` as their index.

        Requires: each such table is indexed by the positions of the tokens, plus a constant.
        Ensures: no table's index depends on the length of the cache.

        Raises:
            Unsupported: a table is indexed by anything but the positions of the tokens.
        """
        for node in list(self.model.graph):
            if (
                node.op_type in {"Gather", "GatherND"}
                and node.inputs[0].const_value is not None
                and self._positional(node.inputs[1])
            ):
                offset, places = self._offset(node.inputs[1]), self._position_ids
                if offset:
                    more = self._number(f"{node.name}/offset", offset)
                    places = self._add(node, "Add", "offset", places, more)
                if node.op_type == "GatherND":
                    places = self._add(node, "Unsqueeze", "places", places, self._last_axis)
                node.replace_input_with(1, places)
                # the exported shape lacks the batch, whose rows now have their own positions
                node.outputs[0].shape = None

    def follow_rows(self) -> None:
        """Computes factors of shape ``[1, sequence, 1, 1]``, one number for each position, from each row's
        own positions. Llama 4 scales its queries by their distance from the first token, and the original
        graph counts the padding.

        Requires: nothing; a factor that is not computed elementwise from positions stays as it is.
        Ensures: the other factors are ``[batch, sequence, 1, 1]``, and equal for rows without padding.
        """
        for node in [node for node in self.model.graph if node.op_type == "Mul"]:
            for place, value in enumerate(node.inputs):
                shape = [] if value is None or value.shape is None else list(value.shape)
                if (
                    len(shape) != 4
                    or shape[2:] != [1, 1]
                    or isinstance(shape[1], int)
                    or not self._positional(value)
                ):
                    continue
                factors = self._of_rows(value, node)
                if factors is not None:
                    axes = self._number("factor_axes", [2, 3])
                    wide = self._add(node, "Unsqueeze", f"{value.name}/factors", factors, axes)
                    node.replace_input_with(place, wide)

    def _of_rows(self, value: ir.Value, before: ir.Node) -> ir.Value | None:
        """Returns a value that is computed elementwise from positions as ``[batch, sequence]``; None if the
        computation is not elementwise.
        """
        node = value.producer()
        if node is None or not self._positional(value):
            return value if value.const_value is not None and value.const_value.size == 1 else None
        if node.op_type in _SHAPING and value.dtype.is_floating_point():
            return self._of_rows(node.inputs[0], before)
        if value.dtype == ir.DataType.INT64:
            return (
                self._position_ids
                if value.shape is not None and len(value.shape) == 1 and self._offset(value) == 0
                else None
            )
        given = [self._of_rows(operand, before) for operand in node.inputs]
        if any(operand is None for operand in given) or node.op_type not in _OF_EACH:
            return None
        copied = self._add(before, node.op_type, f"{value.name}/of_rows", *given, **dict(node.attributes))
        copied.dtype = value.dtype
        return copied

    def _positional(self, value: ir.Value) -> bool:
        """Whether a value depends only on the cache's length and the pass's own tokens. Some graphs count the
        tokens that are not padding; rows of the engine have no padding.
        """
        todo, reached, counts = [value], set[ir.Value](), False
        while todo:
            one = todo.pop()
            if one is None or one in reached or one.const_value is not None:
                continue
            reached.add(one)
            node = one.producer()
            if node is None:
                # an input other than the tokens, such as a mask, makes the value depend on more than
                # positions
                if one is not self._ids:
                    return False
                continue
            # the length of the cache counts as a position, all other shapes do not
            if node.op_type == "Shape":
                counts |= node.inputs[0] in self._past
            else:
                todo += node.inputs
        return counts

    def _offset(self, index: ir.Value) -> int:
        """Returns the constant that a graph adds to token positions to index a table."""
        offsets = {
            int(offset)
            for tokens, before in _TRIALS
            for offset in self._run(index, tokens, before).reshape(-1) - np.arange(before, before + tokens)
        }
        if len(offsets) != 1:
            raise Unsupported(
                "a table of positions is indexed by more than the positions of the tokens",
                found=index.name,
                remedy="leave --static-cache out",
            )
        return offsets.pop()

    def _by_distance(self, value: ir.Value) -> np.ndarray | None:
        """Returns the bias for each distance ``[distances, heads]``, up to the distance from which on it is
        constant.
        """
        scores = self._run(value, 1, _FARTHEST - 1)
        if scores.ndim != 4 or scores.shape[-1] != _FARTHEST:
            raise Unsupported(
                "the bias on an attention's scores does not cover every distance between tokens",
                found=value.name,
                expected=f"up to {_FARTHEST} tokens",
                remedy="leave --static-cache out",
            )
        # one query after all keys: reversed, key i is at distance i
        table = scores[0, :, 0, ::-1].T
        for tokens, before in _TRIALS:
            scores = self._run(value, tokens, before)[0]
            far = before + np.arange(tokens)[:, None] - np.arange(before + tokens)
            if not (
                np.array_equal(scores[:, far >= 0].T, table[far[far >= 0]])
                and (scores[:, far < 0] < _MASKED).all()
            ):
                raise Unsupported(
                    "the bias on an attention's scores depends on more than the distances between tokens",
                    found=value.name,
                    remedy="leave --static-cache out",
                )
        changes = np.flatnonzero((table[1:] != table[:-1]).any(axis=1))
        length = int(changes[-1]) + 2 if len(changes) else 1
        if length == _FARTHEST:
            raise Unsupported(
                "the bias on an attention's scores does not become constant at large distances",
                found=value.name,
                expected=f"within {_FARTHEST} tokens",
                remedy="leave --static-cache out",
            )
        return np.ascontiguousarray(table[:length]) if table[:length].any() else None

    def _look_up(self, table: np.ndarray, value: ir.Value) -> ir.Value:
        name, add = f"bias/{len(self._biases)}", partial(self._add, value.producer())
        zero, one = (self._number(f"{name}/{number}", number) for number in (0, 1))
        keys = self._keys(value.producer(), name, zero, one)
        far = add("Sub", f"{name}/distances", self._queries(value.producer(), name), keys)
        # beyond the last distance of the table the bias is constant; later tokens are hidden by the operator
        near = add("Clip", f"{name}/places", far, zero, self._number(f"{name}/last", len(table) - 1))
        found = add("Gather", f"{name}/found", self._number(f"{name}/table", table), near)
        return add("Transpose", name, found, perm=[0, 3, 1, 2])

    def _keys(self, before: ir.Node, name: str, zero: ir.Value, one: ir.Value) -> ir.Value:
        """Returns the positions of all keys ``[total]``."""
        total = self._add(before, "Cast", f"{name}/total", self._total, to=ir.DataType.INT64)
        return self._add(before, "Range", f"{name}/keys", zero, total, one)

    def _queries(self, before: ir.Node, name: str) -> ir.Value:
        """Returns the positions of the queries ``[batch, sequence, 1]``."""
        return self._add(before, "Unsqueeze", f"{name}/queries", self._position_ids, self._last_axis)

    def _run(self, value: ir.Value, tokens: int, before: int) -> np.ndarray:
        """Computes a value for one row of ``tokens`` tokens after ``before`` cached ones."""
        # a graph is run only where positions are counted by the cache
        import onnxruntime as ort  # noqa: PLC0415

        graph = ir.convenience.extract(self.model.graph, [self._ids, *self._past], [value])
        # in memory, since external data has no folder once the part is serialized
        for held in graph.initializers.values():
            held.const_value = ir.tensor(np.array(held.const_value.numpy()), name=held.name)
        proto = ir.to_proto(in_float32(ir.Model(graph, ir_version=self.model.ir_version)))
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        feeds = {self._ids.name: np.arange(_TOKEN, _TOKEN + tokens)[None]}
        for cache in self._past:
            dtype = np.float32 if cache.dtype == ir.DataType.BFLOAT16 else cache.dtype.numpy()
            feeds[cache.name] = np.zeros((1, cache.shape[1], before, cache.shape[3]), dtype)
        wanted = {one.name for one in session.get_inputs()}
        result: np.ndarray = session.run(
            None, {name: array for name, array in feeds.items() if name in wanted}
        )[0]
        return result

    @property
    def _position_ids(self) -> ir.Value:
        """The input with the position of each token ``[batch, sequence]``; adds it if the graph has none."""
        known = inputs_of(self.model.graph).get("position_ids")
        if known is None:
            known = add_input(self.model.graph, "position_ids", self._ids.shape, ir.DataType.INT64)
        return known

    @property
    def _last_axis(self) -> ir.Value:
        return self._number("last_axis", [-1])

    def _number(self, name: str, value: ArrayLike) -> ir.Value:
        return constant(self.model, name, np.array(value))

    def _add(self, before: ir.Node, op: str, name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        node = named_node(op, f"{PREFIX}{before.name}/{name}", *inputs, **attributes)
        self.model.graph.insert_before(before, node)
        return node.outputs[0]
