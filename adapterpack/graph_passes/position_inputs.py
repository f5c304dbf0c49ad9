"""Replaces positions that a graph counts by the length of its cache with each row's own ``position_ids``.

Graphs use positions in two places: as indexes into tables of positions, and in biases of attention scores by
distance (T5's buckets, ALiBi). Both depend on positions alone, so this module runs these parts of the graph
separately to find out what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from ..bundle import growing_axis
from ..errors import Unsupported
from ..onnx_graph import PRODUCTS, add_input, in_float32, inputs_of, named_node
from .constants import PREFIX, constant

_FARTHEST = 4096
"""The most tokens to test; a bias must be a straight line from some shorter distance on, unless the context
ends there.
"""
_TRIALS = ((3, 5), (2, 0), (1, 9))
"""Pairs of (tokens in the pass, tokens in the cache before them) for which parts of the graph are run."""
_TOKEN = 5
"""The first id of test tokens; none of them is padding."""
_MASKED = -1e4
"""A score below this hides a token; half precision uses -65504."""
_ROUNDING = 1e-6
"""The relative error of a bias that rounding may cause."""

_SHAPING = frozenset({"Expand", "Reshape", "Unsqueeze", "Squeeze", "Identity"})
_OF_EACH = frozenset(
    {"Add", "Sub", "Mul", "Div", "Floor", "Log", "Exp", "Pow", "Sqrt", "Cast", "Max", "Min", "Clip"}
)
"""Operators that only change the shape of their input (``_SHAPING``), and operators that compute each number
from the same number of each input (``_OF_EACH``).
"""


def _lowest(dtype: ir.DataType) -> np.float32:
    """Returns the score of a token that is hidden, which a type holds."""
    return np.float32(-1e4 if dtype == ir.DataType.FLOAT16 else -1e9)


class _Bias(NamedTuple):
    """A bias on scores: ``rows`` ``[n, heads]`` for the first distances between tokens, or with ``of_keys``
    for the first positions of keys, and what each farther one adds to the last.
    """

    rows: np.ndarray
    step: np.ndarray
    of_keys: bool


class PositionInputs:
    """Rewires one graph in place; ``past`` are its cache inputs, ``ids`` its tokens ``[batch, sequence]``;
    its rows have at most ``context`` tokens.
    """

    def __init__(
        self,
        model: ir.Model,
        ids: ir.Value,
        past: Sequence[ir.Value],
        total: ir.Value | None,
        context: int | None = None,
    ) -> None:
        self.model = model
        self._ids = ids
        self._past = past
        self._total = total
        self._context = context
        self._weighing: dict[ir.Value, bool] = {}
        self._hiding: dict[tuple[ir.Value, int], bool | None] = {}
        self._biases: dict[str, list[ir.Value]] = {}

    def read_tokens(self, added: Sequence[ir.Value]) -> bool:
        """Whether any of the values ``added`` to scores depends on what the tokens say."""
        return any(
            self._has_weights(value)
            for value in added
            if not (self._positional(value) or self._weighs(value))
        )

    def bias(self, added: Sequence[ir.Value], attention: ir.Node) -> list[ir.Value]:
        """Returns the values ``added`` to the scores of an ``attention`` (its last node) as one bias
        ``[batch, heads, sequence, total]`` for rows of different lengths. Returns nothing if they only hide
        later tokens. Leaves out values that depend on the tokens of a row, which are masks.

        Raises:
            Unsupported: the bias depends on more than the distance between tokens, or their positions.
        """
        terms = [value for value in added if self._positional(value) or self._weighs(value)]
        name = "+".join(value.name for value in terms)
        if terms and name not in self._biases:
            value = terms[0]
            for other in terms[1:]:
                value = self._add(attention, "Add", f"{value.name}/sum", value, other)
            found = self._tabulate(value)
            self._biases[name] = [] if found is None else [self._look_up(found, value)]
        return self._biases.get(name, [])

    def hides(self, added: Sequence[ir.Value], distance: int, unknown: bool) -> bool:
        """Whether a token does not see the one so far before it by what is ``added`` to its scores;
        ``unknown`` where that depends on more than positions and the mask, or no row is so long.
        """
        within = distance < (self._context or distance + 1)
        for value in added:
            if (value, distance) not in self._hiding:
                hidden = None
                if within and self._positional(value, self._mask):
                    scores = self._run(value, 1, distance).reshape(-1, distance + 1)[:, 0]
                    hidden = bool((~scores if scores.dtype == bool else scores < _MASKED).all())
                self._hiding[value, distance] = hidden
        found = [self._hiding[value, distance] for value in added]
        return any(unknown if hidden is None else hidden for hidden in found)

    def within_chunks(
        self, size: int, bias: Sequence[ir.Value], queries: ir.Value, attention: ir.Node
    ) -> list[ir.Value]:
        """Extends a ``bias`` so that tokens see only their own chunk of ``size`` tokens: ``[batch, 1,
        sequence, total]`` of the type of ``queries``.
        """
        dtype = queries.dtype or ir.DataType.FLOAT
        name = f"chunks/{size}"
        add = partial(self._add, attention)
        if name not in self._biases:
            number, zero, one = self._numbers(name, size=size, zero=0, one=1)
            keys = add("Div", f"{name}/of_keys", self._keys(attention, name, zero, one), number)
            rows = add("Div", f"{name}/of_queries", self._queries(attention, name), number)
            own = add("Equal", f"{name}/own", rows, keys)
            none, hidden = self._numbers(name, none=np.float32(0), hidden=_lowest(dtype))
            shown = add("Where", f"{name}/shown", own, none, hidden)
            heads = add("Unsqueeze", f"{name}/heads", shown, self._number("second_axis", [1]))
            self._biases[name] = [add("Cast", name, heads, to=dtype)]
        (chunks,) = self._biases[name]
        return [add("Add", f"{name}/bias", *bias, chunks)] if bias else [chunks]

    def looking_ahead(
        self,
        added: Sequence[ir.Value],
        image: int | None,
        window: int | None,
        queries: ir.Value,
        attention: ir.Node,
    ) -> list[ir.Value]:
        """Returns the mask of an ``attention`` whose tokens attend to later ones of the same image, or of
        the same prompt, as a bias ``[batch, 1, sequence, total]`` of the type of ``queries``, which also
        hides all other later tokens and those beyond a ``window``; nothing if the values ``added`` to its
        scores hide every later token. ``image`` is the token of images.
        """
        mask = next((value for value in added if not self._positional(value)), None)
        if image is None or mask is None:
            return []
        if mask.name not in self._biases:
            count = (window or 0) + 3
            row = [_TOKEN if image != _TOKEN else _TOKEN + 1, *[image] * count]
            shown = self._run(mask, len(row), 0, np.array([row]))[0, 0]
            shown = shown if shown.dtype == bool else shown > _MASKED
            ahead = shown[1, -1]
            beyond = bool(shown[-1, 1])
            dtype = queries.dtype or ir.DataType.FLOAT
            self._biases[mask.name] = (
                [self._see_ahead(attention, image, window, beyond, dtype)] if ahead else []
            )
        return self._biases[mask.name]

    def _see_ahead(
        self, before: ir.Node, image: int, window: int | None, beyond: bool, dtype: ir.DataType
    ) -> ir.Value:
        """Adds the nodes of such a bias; ``beyond`` says that tokens of one image see
        each other beyond the window.
        """
        add = partial(self._add, before)
        name = f"ahead/{window}"
        zero, one, none, token = self._numbers(name, zero=0, one=1, none=-1, image=image)
        second, third, reach = self._numbers(name, second=[1], third=[2], reach=window or 0)
        seen, hidden = self._numbers(name, seen=np.float32(0), hidden=_lowest(dtype))
        types = inputs_of(self.model.graph).get("token_type_ids")
        if types is None:  # tokens of one image have as many other tokens before them
            inside = add("Equal", f"{name}/inside", self._ids, token)
            others = add("Cast", f"{name}/others", add("Not", f"{name}/outside", inside), to=7)
            group = add("CumSum", f"{name}/counted", others, one)
        else:
            inside = add("Equal", f"{name}/inside", types, zero)
            group = zero
        groups = add("Where", f"{name}/groups", inside, group, none)
        keys = self._keys(before, name, zero, one)
        queries = self._queries(before, name)
        # the place of each key among the pass's tokens, which are all that anyone sees ahead
        first = add("ReduceMin", f"{name}/first", self._position_ids, second)
        place = add("Sub", f"{name}/place", keys, first)
        last = add("Sub", f"{name}/last", add("Shape", f"{name}/tokens", self._ids, start=1, end=2), one)
        near = add("Max", f"{name}/low", add("Min", f"{name}/high", place, last), zero)
        taken = add("GatherElements", f"{name}/taken", groups, near, axis=1)
        read = add("Where", f"{name}/read", add("Equal", f"{name}/own", near, place), taken, none)
        by_query = add("Unsqueeze", f"{name}/by_query", groups, third)
        by_key = add("Unsqueeze", f"{name}/by_key", read, second)
        grouped = add("GreaterOrEqual", f"{name}/grouped", by_query, zero)
        same = add("And", f"{name}/same", add("Equal", f"{name}/equal", by_query, by_key), grouped)
        within = add("Greater", f"{name}/within", keys, add("Sub", f"{name}/start", queries, reach))
        order = [("Or", same), ("And", within)][: 1 if window is None else 2]
        shown = add("LessOrEqual", f"{name}/back", keys, queries)
        for op, other in reversed(order) if beyond else order:
            shown = add(op, f"{name}/{op}", shown, other)
        scores = add("Where", f"{name}/scores", shown, seen, hidden)
        return add("Cast", name, add("Unsqueeze", f"{name}/heads", scores, second), to=dtype)

    def index_tables(self) -> None:
        """Makes position tables read ``position_ids`` as their index.

        Requires: each such table is indexed by the positions of the tokens, plus a constant, or at one place
            in the whole context.
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
                if (only := self._only(node.inputs[1])) is not None:
                    node.replace_input_with(1, self._number(f"{node.outputs[0].name}/only", only))
                    node.outputs[0].shape = None
                    continue
                offset = self._offset(node.inputs[1])
                rows = node.outputs[0]
                made = self._made_of(rows)
                if made and rows not in made and all(one.shape and one.shape[0] == 1 for one in made):
                    for value, users in made.items():
                        self._tabulate_rows(value, node.inputs[0].const_value.shape[0] - offset, users)
                    continue
                places = self._moved(offset, node.name, node)
                if node.op_type == "GatherND":
                    places = self._add(node, "Unsqueeze", "places", places, self._last_axis)
                node.replace_input_with(1, places)
                # the exported shape lacks the batch, whose rows now have their own positions
                node.outputs[0].shape = None

    def _made_of(self, rows: ir.Value) -> dict[ir.Value, list[tuple[ir.Node, int]]]:
        """Returns what a graph makes of a table's rows by positions alone, with its uses beside tokens."""
        made = dict[ir.Value, list[tuple[ir.Node, int]]]()
        todo = [rows]
        for value in todo:
            for node, place in value.uses():
                if self._positional(node.outputs[0], tokens=False):
                    todo += [one for one in node.outputs if one not in todo]
                else:
                    made.setdefault(value, []).append((node, place))
        return made

    def _tabulate_rows(self, value: ir.Value, length: int, uses: Sequence[tuple[ir.Node, int]]) -> None:
        """Reads a value ``[1, ..., sequence, n]`` of positions alone from a table of the first ``length`` of
        them, as ``[batch, ..., sequence, n]``: RoFormer rearranges the sines by which it turns queries.

        Raises:
            Unsupported: its rows are not those of single positions.
        """
        ones = next(axis for axis, size in enumerate([*value.shape, 0]) if size != 1)
        table = self._run(value, length, 0)
        table = table.reshape(table.shape[ones:])
        for tokens, before in _TRIALS:
            found = self._run(value, tokens, before)
            if len(table) != length or not np.array_equal(
                found.reshape(-1), table[before:][:tokens].reshape(-1)
            ):
                raise Unsupported(
                    "what the graph makes of a table of positions is not made position by position",
                    found=value.name,
                    remedy="leave --static-cache out",
                )
        user = value.producer()
        name = f"{value.name}/of_rows"
        rows = self._add(user, "Gather", name, self._number(f"{name}/table", table), self._position_ids)
        if ones > 1:
            rows = self._add(
                user, "Unsqueeze", f"{name}/wide", rows, self._number(f"{name}/axes", range(1, ones))
            )
        for node, place in uses:
            node.replace_input_with(place, rows)

    def follow_rows(self) -> None:
        """Computes factors of one number for each position, ``[1, sequence, 1, 1]`` or ``[1, 1, sequence,
        1]``, from each row's own positions. Llama 4 and Inkling scale queries by their distance from the
        first token, and the original graph counts the padding.

        Requires: nothing; a factor that is not computed elementwise from positions stays as it is.
        Ensures: the other factors have an axis of the batch, and are equal for rows without padding.
        """
        for node in [node for node in self.model.graph if node.op_type == "Mul"]:
            for place, value in enumerate(node.inputs):
                shape = [] if value is None or value.shape is None else list(value.shape)
                axis = next((axis for axis in (1, 2) if shape[3:] == [1] == [shape[3 - axis]]), 0)
                if not axis or isinstance(shape[axis], int) or not self._positional(value):
                    continue
                factors = self._of_rows(value, node)
                if factors is not None:
                    axes = self._number(f"factor_axes/{axis}", [3 - axis, 3])
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
            if value.shape is None or len(value.shape) != 1:
                return None
            return self._moved(self._offset(value), value.name, before)
        given = [self._of_rows(operand, before) for operand in node.inputs]
        if any(operand is None for operand in given) or node.op_type not in _OF_EACH:
            return None
        copied = self._add(before, node.op_type, f"{value.name}/of_rows", *given, **dict(node.attributes))
        copied.dtype = value.dtype
        return copied

    def _moved(self, offset: int, name: str, before: ir.Node) -> ir.Value:
        """Returns the positions of the tokens plus an ``offset`` ``[batch, sequence]``."""
        more = self._number(f"{name}/offset", offset)
        return (
            self._add(before, "Add", f"{name}/moved", self._position_ids, more)
            if offset
            else self._position_ids
        )

    def _weighs(self, value: ir.Value) -> bool:
        """Whether a value adds more to the scores than a mask, though it is computed from one (ALiBi)."""
        if value not in self._weighing:
            numbers = value.dtype is not None and value.dtype.is_floating_point() and self._mask is not None
            scores = np.zeros(1)
            if numbers and self._positional(value, self._mask):
                scores = self._run(value, *_TRIALS[0])
            self._weighing[value] = bool(((scores != 0) & (scores > _MASKED)).any())
        return self._weighing[value]

    def _has_weights(self, value: ir.Value) -> bool:
        """Whether a product with weights goes into a value."""
        todo = [value]
        reached = set()
        while todo:
            one = todo.pop()
            if one is None or one in reached or (node := one.producer()) is None:
                continue
            if node.op_type in PRODUCTS:
                return True
            reached.add(one)
            todo += node.inputs if node.op_type != "Shape" else ()
        return False

    def _positional(self, value: ir.Value, mask: ir.Value | None = None, tokens: bool = True) -> bool:
        """Whether a value depends only on the cache's length, the pass's own ``tokens``, and a ``mask``. Some
        graphs count the tokens that are not padding; rows of the engine have no padding.
        """
        todo = [value]
        reached = set()
        counts = False
        while todo:
            one = todo.pop()
            if one is None or one in reached or one.const_value is not None:
                continue
            reached.add(one)
            node = one.producer()
            if node is None:
                # an input other than the tokens, such as a mask, makes the value depend on more than
                # positions
                if not (tokens and one is self._ids) and one is not mask:
                    return False
                counts |= one is mask
                continue
            # the length of the cache counts as a position, all other shapes do not
            if node.op_type == "Shape":
                counts |= node.inputs[0] in self._past
            else:
                todo += node.inputs
        return counts

    def _only(self, index: ir.Value) -> np.ndarray | None:
        """Returns the one row of a table that a graph reads at every position of its context, as an index for
        all of them; None if it reads several. Decoders of BERT's kind look up the type of each token so.
        """
        if self._context is None:
            return None
        trials = [self._run(index, tokens, before) for tokens, before in (*_TRIALS, (1, self._context - 1))]
        first = trials[0].reshape(-1)[0]
        return np.full([1] * trials[0].ndim, first) if all((one == first).all() for one in trials) else None

    def _offset(self, index: ir.Value) -> int:
        """Returns the constant that a graph adds to token positions to index a table."""
        trials = [(self._run(index, *trial).reshape(-1), np.arange(trial[0]) + trial[1]) for trial in _TRIALS]
        alike = all(len(found) == len(places) for found, places in trials)
        offsets = {int(offset) for found, places in trials for offset in found - places} if alike else set()
        if len(offsets) != 1:
            raise Unsupported(
                "a table of positions is indexed by more than the positions of the tokens",
                found=index.name,
                remedy="leave --static-cache out",
            )
        return offsets.pop()

    def _tabulate(self, value: ir.Value) -> _Bias | None:
        """Returns the bias that a value adds to scores; None if it only hides later tokens."""
        most = min(_FARTHEST, self._context or _FARTHEST)
        # one query after all keys
        by_key = self._scores(value, 1, most - 1)[:, 0].T
        if len(by_key) != most:
            raise Unsupported(
                "the bias on an attention's scores does not cover every distance between tokens",
                found=value.name,
                expected=f"up to {most} tokens",
                remedy="leave --static-cache out",
            )
        # a softmax does not change where all scores of a token are moved by as much
        moved = by_key - by_key[-1]
        forms = ((by_key[::-1], False, False), (moved[::-1], False, True), (by_key, True, False))
        rows, of_keys, _ = next(
            (form for form in forms if all(self._agrees(value, form, *trial) for trial in _TRIALS)),
            (None, False, False),
        )
        if rows is None:
            raise Unsupported(
                "the bias on an attention's scores depends on more than the distances between tokens",
                found=value.name,
                remedy="leave --static-cache out",
            )
        half = most // 2
        step = (rows[-1] - rows[half]) / np.float32(most - 1 - half)
        line = rows[-1] - np.arange(most - 1, -1, -1, dtype=np.float32)[:, None] * step
        bent = np.flatnonzero((np.abs(rows - line) > np.abs(rows).max() * _ROUNDING * step.any()).any(axis=1))
        length = int(bent[-1]) + 2 if len(bent) else 1
        if length >= most and most != self._context:
            raise Unsupported(
                "the bias on an attention's scores does not become constant at large distances",
                found=value.name,
                expected=f"within {most} tokens",
                remedy="leave --static-cache out",
            )
        rows = np.ascontiguousarray(rows[:length])
        return _Bias(rows, step, of_keys) if rows.any() or step.any() else None

    def _agrees(self, value: ir.Value, form: tuple[np.ndarray, bool, bool], tokens: int, before: int) -> bool:
        """Whether a value adds to the scores of ``tokens`` tokens after ``before`` others what the rows of a
        form say, by distances or by keys; or that and what it adds to a token's score of itself.
        """
        rows, of_keys, moved = form
        scores = self._scores(value, tokens, before)
        places = before + np.arange(tokens)
        keys = np.broadcast_to(np.arange(before + tokens), scores.shape[1:])
        far = places[:, None] - keys
        if moved:
            scores = scores - scores[:, np.arange(tokens), places, None]
        found = rows[np.maximum(keys if of_keys else far, 0)]
        seen = far >= 0
        return np.allclose(scores[:, seen].T, found[seen], rtol=_ROUNDING, atol=0)

    def _scores(self, value: ir.Value, tokens: int, before: int) -> np.ndarray:
        """Returns what a value adds to the scores of one row ``[heads, tokens, keys]``."""
        scores = self._run(value, tokens, before)
        heads, _, keys = (1, 1, *scores.shape)[-3:]
        return np.broadcast_to(scores.reshape(heads, -1, keys), (heads, tokens, keys))

    def _look_up(self, bias: _Bias, value: ir.Value) -> ir.Value:
        name = f"bias/{len(self._biases)}"
        add = partial(self._add, value.producer())
        zero, one, last = self._numbers(name, zero=0, one=1, last=len(bias.rows) - 1)
        queries = self._queries(value.producer(), name)
        places = add("Sub", f"{name}/distances", queries, self._keys(value.producer(), name, zero, one))
        if bias.of_keys:
            places = add("Sub", f"{name}/of_keys", queries, places)
        # later tokens, whose distance is negative, are hidden by the operator
        near = add("Clip", f"{name}/places", places, zero, last)
        found = add("Gather", f"{name}/found", self._number(f"{name}/table", bias.rows), near)
        result = add("Transpose", f"{name}/near", found, perm=[0, 3, 1, 2])
        if bias.step.any():
            beyond = add("Cast", f"{name}/numbers", add("Sub", f"{name}/beyond", places, near), to=1)
            heads = add("Unsqueeze", f"{name}/heads", beyond, self._number("second_axis", [1]))
            steps = add("Mul", f"{name}/steps", heads, self._number(f"{name}/step", bias.step[:, None, None]))
            result = add("Add", f"{name}/line", result, steps)
        return add("Cast", name, result, to=value.dtype or ir.DataType.FLOAT)

    def _keys(self, before: ir.Node, name: str, zero: ir.Value, one: ir.Value) -> ir.Value:
        """Returns the positions of all keys ``[total]``."""
        total = self._add(before, "Cast", f"{name}/total", self._total, to=ir.DataType.INT64)
        return self._add(before, "Range", f"{name}/keys", zero, total, one)

    def _queries(self, before: ir.Node, name: str) -> ir.Value:
        """Returns the positions of the queries ``[batch, sequence, 1]``."""
        return self._add(before, "Unsqueeze", f"{name}/queries", self._position_ids, self._last_axis)

    def _run(self, value: ir.Value, tokens: int, before: int, ids: np.ndarray | None = None) -> np.ndarray:
        """Computes a value for one row of ``tokens`` tokens after ``before`` cached ones."""
        # a graph is run only where positions are counted by the cache
        import onnxruntime as ort  # noqa: PLC0415

        given = [self._ids, *self._past, *([] if self._mask is None else [self._mask])]
        others = [one for one in self.model.graph.inputs if one not in given and one.const_value is None]
        graph = ir.convenience.extract(self.model.graph, [*given, *others], [value])
        # in memory, since external data has no folder once the part is serialized
        for held in graph.initializers.values():
            held.const_value = ir.tensor(np.array(held.const_value.numpy()), name=held.name)
        proto = ir.to_proto(in_float32(ir.Model(graph, ir_version=self.model.ir_version)))
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        feeds = {self._ids.name: np.arange(_TOKEN, _TOKEN + tokens)[None] if ids is None else ids}
        if self._mask is not None:
            feeds[self._mask.name] = np.ones((1, before + tokens), np.int64)
        sizes = {"sequence": tokens, "past": before, "total": before + tokens}
        for cache in self._past:
            dtype = np.float32 if cache.dtype == ir.DataType.BFLOAT16 else cache.dtype.numpy()
            sides = [
                before if at == growing_axis(cache.name, cache.shape) else one
                for at, one in enumerate(cache.shape)
            ]
            feeds[cache.name] = np.zeros((1, *sides[1:]), dtype)
        for one in others:  # whose shapes alone are read
            shape = [dim if isinstance(dim, int) else sizes.get(str(dim.value), 1) for dim in one.shape]
            feeds[one.name] = np.zeros(
                shape, np.float32 if one.dtype == ir.DataType.BFLOAT16 else one.dtype.numpy()
            )
        wanted = {one.name for one in session.get_inputs()}
        result: np.ndarray = session.run(
            None, {name: array for name, array in feeds.items() if name in wanted}
        )[0]
        return result

    @property
    def _mask(self) -> ir.Value | None:
        """The mask among the graph's inputs; None once a pass has removed it."""
        return inputs_of(self.model.graph).get("attention_mask")

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

    def _numbers(self, name: str, **values: ArrayLike) -> list[ir.Value]:
        return [self._number(f"{name}/{key}", value) for key, value in values.items()]

    def _add(self, before: ir.Node, op: str, name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        node = named_node(op, f"{PREFIX}{before.name}/{name}", *inputs, **attributes)
        self.model.graph.insert_before(before, node)
        return node.outputs[0]
