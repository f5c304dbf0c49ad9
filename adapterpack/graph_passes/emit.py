"""Turns normal forms into ONNX nodes; the only place that knows ONNX operators for adapters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from ..adapter_methods.forms.blocks import EPSILON
from ..bundle.manifest import ADAPTER_IDS, ADAPTER_POSITIONS, ADDED, MappedSite
from ..slots.blocks import BRANCHES, Branch
from ..slots.precision import ABSENT, convert
from ..slots.routes import BRANCHES as ROUTES
from ..slots.routes import RouteBranch
from ..tasks.task import AXES
from .constants import add_initializer

_BEFORE = frozenset({"pre", "turn", "turn_down"})
"""Fields of a layer that change its input."""
_OUTPUTS = {"TopK": 2}
"""The number of outputs of operators that have more than the one that is used."""

Op = Callable[..., ir.Value]
"""``op(name, *inputs)`` adds a node and returns its output; an input may be a number."""


def _silu(op: Op, x: ir.Value) -> ir.Value:
    return op("Mul", x, op("Sigmoid", x))


def _gelu(op: Op, x: ir.Value) -> ir.Value:
    erf = op("Erf", op("Mul", x, math.sqrt(0.5)))
    return op("Mul", op("Mul", x, 0.5), op("Add", erf, 1.0))


def _gelu_tanh(op: Op, x: ir.Value) -> ir.Value:
    cube = op("Mul", op("Mul", op("Mul", x, x), x), 0.044715)
    tanh = op("Tanh", op("Mul", op("Add", x, cube), math.sqrt(2 / math.pi)))
    return op("Mul", op("Mul", x, 0.5), op("Add", tanh, 1.0))


ACTIVATION_NODES: dict[str, Callable[[Op, ir.Value], ir.Value]] = {
    "identity": lambda op, x: x,
    "relu": lambda op, x: op("Relu", x),
    "tanh": lambda op, x: op("Tanh", x),
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
"""Name -> the nodes of an activation on ``x``."""


class Emitter:
    """Adds nodes to one graph, each right after the nodes that it reads.

    ``batched``: the first axis of a slot is the batch (a bank); otherwise a slot holds the values of one
    adapter. ``positions`` ``[batch, tokens]`` says at which tokens adapters act, for sites that need it.
    """

    def __init__(self, model: ir.Model, batched: bool, positions: ir.Value | None = None) -> None:
        self.graph = model.graph
        self.batched = batched
        self.positions = positions
        self.ids: ir.Value | None = None
        self.values = {
            value.name: value
            for node in self.graph
            for value in [*node.inputs, *node.outputs]
            if value is not None
        }
        self.nodes = {node.name: node for node in self.graph}
        self._newest: dict[ir.Value, ir.Value] = {}
        self._after: ir.Node | None = None
        self._inner: dict[str, ir.Value] = {}

    def site(self, site: MappedSite, slots: Mapping[str, ir.Value]) -> None:
        """Adds the branches of one site to the graph: ``slots`` maps each field to the value of its slot."""
        # an earlier site may have replaced this value, for instance a layer at the end of an adapted block
        y = self._latest(self.values[site.output])
        base = self.nodes[site.node]
        x = base.inputs[1] if site.kind == "lookup" else base.inputs[0]
        if site.members:
            self._siblings(site, x, y, slots)
            return
        self._after = y.producer()
        if site.kind == "prompt":
            self._feed_prompt(site, slots)
            return
        if site.kind != "linear":
            result = y
            if slots.keys() & {"down", "delta"}:
                added = (
                    self._look_up(site, x, slots)
                    if site.kind == "lookup"
                    else self._of_patches(site, x, y, slots)
                )
                result = self._op("Add", site, "sum", y, added)
            for field, op in (("scale", "Mul"), ("shift", "Add")):
                if field in slots:
                    result = self._op(op, site, field, result, self._over_places(site, slots[field], y))
            self._replace(y, result)
            return
        # changes of the input have to come before the base's node, all others after it
        if site.flat and slots.keys() & _BEFORE:
            self._before(base)
        wide = self._by_row(site, "x", x, slots)
        site, flat = dataclasses.replace(site, rank=3) if wide is not x else site, wide is not x
        if "head" in slots:
            self._replace(y, self._join_rows(site, "head", self._head(site, wide, slots), flat))
            return
        if slots.keys() & (_BEFORE | {"attended_keys"}):
            self._before(base)
            turned = (
                self._place(site, "turned", self._turn(site, wide, slots), wide)
                if slots.keys() & _BEFORE
                else wide
            )
            turned = self._attend(site, turned, slots) if "attended_keys" in slots else turned
            base.replace_input_with(0, self._join_rows(site, "turned", turned, flat))
        self._after = y.producer()
        x, plain = wide, self._by_row(site, "y", y, slots)
        result = self._change(site, x, plain, slots)
        for branch in BRANCHES.values():
            if f"{branch.name}_down" in slots:
                z = self._latest(self.values[site.entry]) if branch.reads_input else result
                result = self._op(
                    "Add", site, f"{branch.name}/sum", result, self._branch(site, branch, z, slots)
                )
        self._replace(y, self._join_rows(site, "y", self._place(site, "placed", result, plain), flat))

    def _feed_prompt(self, site: MappedSite, slots: Mapping[str, ir.Value]) -> None:
        """Replaces the prompt inputs with which the graph was exported by the slots; expands them over the
        rows where rows cannot choose an adapter.
        """
        inputs = {value.name: value for value in self.graph.inputs}
        self._after = None
        for field, given in slots.items():
            slot = given
            if not self.batched:
                rows = self._op(
                    "Shape", site, f"{field}/rows", inputs["input_ids"], attributes={"start": 0, "end": 1}
                )
                shape = self._op(
                    "Concat",
                    site,
                    f"{field}/shape",
                    rows,
                    self._op("Shape", site, f"{field}/extents", slot),
                    attributes={"axis": 0},
                )
                slot = self._op("Expand", site, f"{field}/each", slot, shape)
            # the graph was traced with the prompt as inputs, since a slot does not exist before export
            traced = inputs[field]
            for node, index in list(traced.uses()):
                node.replace_input_with(index, slot)
            self.graph.inputs.remove(traced)

    def _change(
        self, site: MappedSite, x: ir.Value, result: ir.Value, slots: Mapping[str, ir.Value]
    ) -> ir.Value:
        """Returns a layer's output after the adapter's additive change, scaling, mixing and shift."""
        if "up" in slots:
            # siblings share one product with their down factors, which is computed already
            inner = (x, slots["down"]) if "down" in slots else (self._inner[site.path],)
            result = self._op("Add", site, "sum", result, self._product(site, "up", *inner, slots["up"]))
        if "delta" in slots:
            result = self._op(
                "Add", site, "delta/sum", result, self._product(site, "delta", x, slots["delta"])
            )
        for route in ROUTES.values():
            if f"{route.name}_{route.leaf}" in slots:
                result = self._op(
                    "Add", site, f"{route.name}/sum", result, self._route(site, route, x, slots)
                )
        if "scale" in slots:
            result = self._op("Mul", site, "scale", result, self._lift(site, slots["scale"]))
        if "mix" in slots:
            result = self._op("Add", site, "mixed", result, self._product(site, "mix", result, slots["mix"]))
        if "shift" in slots:
            result = self._op("Add", site, "shift", result, self._lift(site, slots["shift"]))
        return result

    def _look_up(self, site: MappedSite, tokens: ir.Value, slots: Mapping[str, ir.Value]) -> ir.Value:
        """Computes ``down[token] up`` for every token; in a bank indexes ``[slots, entries, r]`` by adapter
        and token at once.
        """
        if not self.batched:
            rows = self._op("Gather", site, "down/rows", slots["down"], tokens, attributes={"axis": 0})
        else:
            last, shape = self._constant(site, "last", [-1]), self._op("Shape", site, "tokens/shape", tokens)
            row_ids = self._op("Unsqueeze", site, "ids/each", self.ids, self._constant(site, "axis", [1]))
            pairs = [
                self._op("Unsqueeze", site, f"{name}/last", value, last)
                for name, value in (
                    ("ids", self._op("Expand", site, "ids/tokens", row_ids, shape)),
                    ("tokens", tokens),
                )
            ]
            places = self._op("Concat", site, "places", *pairs, attributes={"axis": -1})
            rows = self._op("GatherND", site, "down/rows", slots["down"], places)
        return self._op("MatMul", site, "up", rows, slots["up"])

    def _of_patches(
        self, site: MappedSite, x: ir.Value, y: ir.Value, slots: Mapping[str, ir.Value]
    ) -> ir.Value:
        """Computes ``patch down up + patch delta`` for every patch of an image, in the shape of the
        convolution's output.
        """
        (_, channels, *sizes), (_, out, *grid) = x.shape, y.shape
        kernel = [size // count for size, count in zip(sizes, grid, strict=True)]
        cut = self._reshape(site, "cut", x, [0, channels, grid[0], kernel[0], grid[1], kernel[1]])
        apart = self._op("Transpose", site, "apart", cut, attributes={"perm": [0, 2, 4, 1, 3, 5]})
        # [batch, rows, columns, channels, height, width]: a patch is the last three axes, as in the kernel
        patches = self._reshape(site, "patches", apart, [0, grid[0] * grid[1], site.in_features])
        outer = None
        if "down" in slots:
            inner = self._op("MatMul", site, "down", patches, slots["down"])
            outer = self._op("MatMul", site, "up", inner, slots["up"])
        if "delta" in slots:
            dense = self._op("MatMul", site, "delta", patches, slots["delta"])
            outer = dense if outer is None else self._op("Add", site, "delta/sum", outer, dense)
        added = self._op("Transpose", site, "by_channel", outer, attributes={"perm": [0, 2, 1]})
        return self._reshape(site, "image", added, [0, out, *grid])

    def _over_places(self, site: MappedSite, vector: ir.Value, y: ir.Value) -> ir.Value:
        """Reshapes a vector of the outputs, one for each row in a bank, to broadcast over the tokens or
        patches of ``y``.
        """
        axes = list(range(1, len(y.shape) - 1)) if site.kind == "lookup" else list(range(2, len(y.shape)))
        axes = axes if self.batched else [] if site.kind == "lookup" else [axis - 1 for axis in axes]
        if not axes:
            return vector
        return self._op(
            "Unsqueeze",
            site,
            f"{vector.name}.over",
            vector,
            self._constant(site, f"{vector.name}.places", axes),
        )

    def _reshape(self, site: MappedSite, what: str, value: ir.Value, shape: list[int]) -> ir.Value:
        return self._op(
            "Reshape",
            site,
            what,
            value,
            self._constant(site, f"{what}/shape", [int(extent) for extent in shape]),
        )

    def _by_row(
        self, site: MappedSite, what: str, value: ir.Value, slots: Mapping[str, ir.Value]
    ) -> ir.Value:
        """Reshapes the tokens of a flat site from ``[batch * tokens, n]`` to ``[batch, tokens, n]`` where
        every row has its own slots.
        """
        if not (site.flat and self.batched):
            return value
        rows = self._op(
            "Shape", site, f"{what}/rows", next(iter(slots.values())), attributes={"start": 0, "end": 1}
        )
        last = self._op("Shape", site, f"{what}/width", value, attributes={"start": -1})
        shape = self._op(
            "Concat",
            site,
            f"{what}/shape",
            rows,
            self._constant(site, "rest", [-1]),
            last,
            attributes={"axis": 0},
        )
        return self._op("Reshape", site, f"{what}/by_row", value, shape)

    def _join_rows(self, site: MappedSite, what: str, value: ir.Value, flat: bool) -> ir.Value:
        """Flattens the rows of a flat site again."""
        if not flat:
            return value
        last = self._op("Shape", site, f"{what}/out_width", value, attributes={"start": -1})
        shape = self._op(
            "Concat",
            site,
            f"{what}/out_shape",
            self._constant(site, "rest", [-1]),
            last,
            attributes={"axis": 0},
        )
        return self._op("Reshape", site, f"{what}/joined", value, shape)

    def gather(self, site: MappedSite, field: str, bank: ir.Value, ids: ir.Value) -> ir.Value:
        """Selects the rows of a bank for the batch: ``[slots, ...]`` and ids ``[batch]`` give ``[batch,
        ...]``.
        """
        self._after = None
        return self._op("Gather", site, f"{field}/rows", bank, ids, attributes={"axis": 0})

    def _siblings(self, site: MappedSite, x: ir.Value, y: ir.Value, slots: Mapping[str, ir.Value]) -> None:
        """Adds the nodes that sibling sites share: one branch on their packed product, or ``x`` times all
        their ``down`` factors side by side, split by site.
        """
        self._after = y.producer()
        if "up" in slots:
            self._replace(
                y, self._op("Add", site, "sum", y, self._product(site, "up", x, slots["down"], slots["up"]))
            )
            return
        wide = self._by_row(site, "x", x, slots)
        site, x = dataclasses.replace(site, rank=3) if wide is not x else site, wide
        wide, count = self._product(site, "down", x, slots["down"]), len(site.members)
        parts = self._ops(
            "Split", site, "parts", wide, outputs=count, attributes={"axis": -1, "num_outputs": count}
        )
        self._inner |= dict(zip(site.members, parts, strict=True))

    def _place(self, site: MappedSite, what: str, changed: ir.Value, plain: ir.Value) -> ir.Value:
        """Selects the changed value at the positions where a row's adapter acts, and the plain value
        elsewhere.
        """
        if not site.positional:
            return changed
        lift = self._op(
            "Unsqueeze", site, f"{what}/positions", self.positions, self._constant(site, "last", [-1])
        )
        return self._op("Where", site, what, lift, changed, plain)

    def _turn(self, site: MappedSite, x: ir.Value, slots: Mapping[str, ir.Value]) -> ir.Value:
        """Returns the base layer's input as the adapter transforms it."""
        if "pre" in slots:
            x = self._op("Mul", site, "pre", x, self._lift(site, slots["pre"]))
        changes = [
            self._product(site, field, x, *(slots[slot] for slot in fields))
            for field, fields in (("turn", ("turn",)), ("turn_up", ("turn_down", "turn_up")))
            if fields[0] in slots
        ]
        for number, change in enumerate(changes):
            x = self._op("Add", site, f"turned_{number}", x, change)
        return x

    def _attend(self, site: MappedSite, x: ir.Value, slots: Mapping[str, ir.Value]) -> ir.Value:
        """Returns the input of an output projection plus the heads' attention to a prompt: ``gate softmax(q
        keys + absent) values``.
        """
        assert site.heads is not None
        heads, queries = site.heads, self._latest(self.values[site.heads.queries])

        def op(name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
            return self._op(name, site, f"attended/{name}_{len(self.graph)}", *inputs, attributes=attributes)

        def lift(field: str, axes: list[int]) -> ir.Value:
            return op("Unsqueeze", slots[field], self._constant(site, f"{field}/axes", axes))

        if len(queries.shape) == 3:
            apart = self._reshape(site, "attended/heads", queries, [0, 0, heads.count, heads.width])
            queries = op("Transpose", apart, perm=[0, 2, 1, 3])
        shared = self._reshape(site, "attended/shared", queries, [0, heads.key_heads, -1, heads.width])
        absent = lift("attended_absent", [1, 2]) if self.batched else slots["attended_absent"]
        weights = op("Softmax", op("Add", op("MatMul", shared, slots["attended_keys"]), absent), axis=-1)
        by_head = self._reshape(
            site,
            "attended/each",
            op("MatMul", weights, slots["attended_values"]),
            [0, heads.count, -1, heads.width],
        )
        gated = op("Mul", by_head, lift("attended_gate", [2, 3] if self.batched else [1, 2]))
        joined = self._reshape(
            site, "attended/joined", op("Transpose", gated, perm=[0, 2, 1, 3]), [0, 0, site.in_features]
        )
        return op("Add", x, joined)

    def _branch(
        self, site: MappedSite, branch: Branch, z: ir.Value, slots: Mapping[str, ir.Value]
    ) -> ir.Value:
        """Computes ``act(norm(z) down + down_bias) up + up_bias``; the branch's name prefixes the fields."""

        def op(name: str, *inputs: ir.Value, attributes: Mapping[str, object] | None = None) -> ir.Value:
            what = f"{branch.name}/{name}_{len(self.graph)}"
            values = [
                self._constant(site, str(x), np.float32(x)) if isinstance(x, float) else x for x in inputs
            ]
            return self._op(name, site, what, *values, attributes=attributes)

        def vector(leaf: str) -> ir.Value:
            return self._lift(site, slots[f"{branch.name}_{leaf}"])

        if branch.normed:
            ones = self._constant(site, "ones", np.ones(site.out_features, np.float32))
            z = op("LayerNormalization", z, ones, attributes={"axis": -1, "epsilon": EPSILON})
            z = op("Add", op("Mul", z, vector("norm_weight")), vector("norm_bias"))
        inner = op(
            "Add",
            self._product(site, f"{branch.name}/down", z, slots[f"{branch.name}_down"]),
            vector("down_bias"),
        )
        added = self._product(
            site, f"{branch.name}/up", ACTIVATION_NODES[branch.act](op, inner), slots[f"{branch.name}_up"]
        )
        return op("Add", added, vector("up_bias")) if f"{branch.name}_up_bias" in slots else added

    def _route(
        self, site: MappedSite, route: RouteBranch, x: ir.Value, slots: Mapping[str, ir.Value]
    ) -> ir.Value:
        """Computes ``((x down) (g spread)) up``, where g is the softmax over the scores that reach the k-th
        largest.
        """

        def op(name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
            return self._op(
                name, site, f"{route.name}/{name}_{len(self.graph)}", *inputs, attributes=attributes
            )

        def product(value: ir.Value, leaf: str) -> ir.Value:
            return self._product(site, f"{route.name}/{leaf}", value, slots[f"{route.name}_{leaf}"])

        def vector(leaf: str) -> ir.Value:
            return self._lift(site, slots[f"{route.name}_{leaf}"])

        narrow = product(x, "down")
        if route.scores == "fuse":
            turned = op(
                "Transpose", slots[f"{route.name}_spread"], perm=[0, 2, 1] if self.batched else [1, 0]
            )
            scores = self._product(
                site, f"{route.name}/answers", op("Mul", product(x, "query"), narrow), turned
            )
        else:
            scores = product(x, "keys")
        scores = op("Add", op("Abs", scores) if route.scores == "abs" else scores, vector("bias"))
        every = op("Shape", slots[f"{route.name}_bias"], start=-1)
        ranked = op("TopK", scores, every, axis=-1, largest=1, sorted=1)
        least = op(
            "ReduceSum",
            op("Mul", ranked, vector("pick")),
            self._constant(site, "last_axis", [-1]),
            keepdims=1,
        )
        kept = op(
            "Where", op("GreaterOrEqual", scores, least), scores, self._constant(site, "absent", ABSENT)
        )
        weights = product(op("Softmax", kept, axis=-1), "spread")
        return product(op("Mul", narrow, weights), "up")

    def _product(self, site: MappedSite, what: str, x: ir.Value, *matrices: ir.Value) -> ir.Value:
        """Multiplies ``x`` by one matrix after the other."""
        value = (
            self._op("Unsqueeze", site, f"{what}/wide", x, self._constant(site, "axis", [1]))
            if self._flat(site)
            else x
        )
        for number, matrix in enumerate(matrices):
            value = self._op("MatMul", site, f"{what}/{number}", value, matrix)
        return (
            self._op("Squeeze", site, f"{what}/flat", value, self._constant(site, "axis", [1]))
            if self._flat(site)
            else value
        )

    def _head(self, site: MappedSite, x: ir.Value, slots: Mapping[str, ir.Value]) -> ir.Value:
        y = self._product(site, "head", x, slots["head"])
        return (
            self._op("Add", site, "bias", y, self._lift(site, slots["head_bias"]))
            if "head_bias" in slots
            else y
        )

    def _flat(self, site: MappedSite) -> bool:
        """Whether the site's input is ``[batch, in]``. A batched weight then needs an extra axis: MatMul
        would broadcast wrongly without an error.
        """
        return self.batched and site.rank == 2

    def _lift(self, site: MappedSite, vector: ir.Value) -> ir.Value:
        """Reshapes a per-row vector ``[batch, n]`` to broadcast over ``[batch, positions, n]``."""
        if not self.batched or site.rank == 2:
            return vector
        axes = self._constant(site, f"{vector.name}.axes", list(range(1, site.rank - 1)))
        return self._op("Unsqueeze", site, f"{vector.name}.lifted", vector, axes)

    def _constant(self, site: MappedSite, name: str, numbers: ArrayLike) -> ir.Value:
        full = f"{ADDED}{site.path}/{name}"
        if full not in self.values:
            array = np.asarray(numbers)
            if array.dtype == np.float32:
                array = convert(array, site.dtype, full)
            self.values[full] = add_initializer(self.graph, ir.tensor(array, name=full))
        return self.values[full]

    def _op(
        self,
        op: str,
        site: MappedSite,
        what: str,
        *inputs: ir.Value,
        attributes: Mapping[str, object] | None = None,
    ) -> ir.Value:
        return self._ops(op, site, what, *inputs, outputs=_OUTPUTS.get(op, 1), attributes=attributes)[0]

    def _ops(
        self,
        op: str,
        site: MappedSite,
        what: str,
        *inputs: ir.Value,
        outputs: int,
        attributes: Mapping[str, object] | None = None,
    ) -> ir.Value:
        name = f"{ADDED}{site.path}/{what}"
        node = ir.node(op, list(inputs), attributes, name=name, num_outputs=outputs)
        for number, output in enumerate(node.outputs):
            output.name = f"{name}:{number}"
        if self._after is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(self._after, node)
        self._after = node
        return node.outputs

    def _before(self, node: ir.Node) -> None:
        """Inserts the next nodes before ``node``."""
        position = self.graph.index(node)
        self._after = self.graph[position - 1] if position else None

    def _latest(self, value: ir.Value) -> ir.Value:
        """Returns the value that has replaced ``value`` so far: a block and the layer that ends it may both
        be adapted.
        """
        while value in self._newest:
            value = self._newest[value]
        return value

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        """Replaces every use of ``old`` outside the new nodes by ``new``; a graph output keeps its name."""
        if new is old:  # the adapter changes only the input of the base layer
            return
        self._newest[old] = new
        # the new value may have another last axis: a head may have another width
        if new.shape is None and old.shape is not None:
            new.shape, new.type = ir.Shape([*list(old.shape)[:-1], None]), old.type
        emitted = {node for node in self.graph if node.name and node.name.startswith(ADDED)}
        for node, index in list(old.uses()):
            if node not in emitted:
                node.replace_input_with(index, new)
        if old.is_graph_output():
            name = old.name
            old.name, new.name = f"{name}/base", name
            new.shape, new.type = new.shape or old.shape, old.type
            for position, value in enumerate(self.graph.outputs):
                if value is old:
                    self.graph.outputs[position] = new


def ids_input(model: ir.Model, batch: ir.SymbolicDim | int) -> ir.Value:
    """Adds the graph input ``adapter_ids`` [batch], int64; slot 0 is the base."""
    value = ir.val(ADAPTER_IDS, ir.DataType.INT64, [batch])
    model.graph.inputs.append(value)
    return value


def rows_of(model: ir.Model) -> ir.SymbolicDim | int:
    """Returns the batch axis: the first axis of the model's first input."""
    inputs = model.graph.inputs
    return next((value for value in inputs if value.name in AXES), inputs[0]).shape[0]


def positions_input(model: ir.Model) -> ir.Value:
    """Adds the graph input ``adapter_positions`` [batch, tokens], bool, of the shape of the ids."""
    ids = next(value for value in model.graph.inputs if value.name.endswith("input_ids"))
    value = ir.val(ADAPTER_POSITIONS, ir.DataType.BOOL, list(ids.shape)[:2])
    model.graph.inputs.append(value)
    return value


def give_zeros(model: ir.Model, names: Collection[str]) -> None:
    """Makes inputs along tokens optional with zeros as the default: one zero is stored and expanded over all
    tokens.
    """
    graph = model.graph
    for place, whole in enumerate(graph.inputs):
        if whole.name not in names or whole.name in graph.initializers:
            continue
        name, ids = whole.name, next(value for value in graph.inputs if value.name == "input_ids")
        tensor = ir.tensor(np.zeros((1, 1), whole.dtype.numpy()), name=name)
        given = ir.Value(
            name=name,
            shape=ir.Shape([f"{name}_batch", f"{name}_sequence"]),
            type=whole.type,
            const_value=tensor,
        )
        graph.inputs[place] = given
        whole.name = f"{name}/whole"
        extents = ir.node("Shape", [ids], name=f"{name}/shape")
        graph.insert_before(
            graph[0],
            [extents, ir.node("Expand", [given, extents.outputs[0]], outputs=[whole], name=f"{name}/expand")],
        )
        graph.register_initializer(given)


def slot_input(model: ir.Model, name: str, default: np.ndarray, symbols: list[int | str]) -> ir.Value:
    """Adds a graph input with a default, which ONNX Runtime calls an overridable initializer. ``symbols`` is
    its declared shape.
    """
    tensor = ir.tensor(default, name=name)
    value = ir.Value(name=name, shape=ir.Shape(symbols), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.inputs.append(value)
    model.graph.register_initializer(value)
    return value
