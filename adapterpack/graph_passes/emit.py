"""Turns normal forms into ONNX nodes; the only place that knows ONNX operators for adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from ..adapter_methods.forms.blocks import EPSILON
from ..bundle import ADDED, MappedSite
from ..onnx_graph import Extent, add_initializer, inputs_of, take_output, values_of
from ..slots import ABSENT, EXPERTS, Branch, RouteBranch, convert
from ..slots.blocks import BRANCHES
from ..slots.routes import BRANCHES as ROUTES
from ..tasks import AXES
from .expert_nodes import PairBlocks, blocks_of
from .experts import ExpertProduct, expert_product

_BEFORE = frozenset({"pre", "turn", "turn_down"})
"""Fields of a layer that change its input."""

Op = Callable[..., ir.Value]
"""``op(name, *inputs)`` adds a node and returns its first output; an input may be a float, or an integer with
one axis.
"""


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

    ``ids`` ``[batch]``: the first axis of a slot is the batch (a bank), and the ids choose each row's
    adapter; without them a slot holds the values of one adapter. ``positions`` ``[batch, tokens]`` says at
    which tokens adapters act, for sites that need it.
    """

    def __init__(
        self, model: ir.Model, ids: ir.Value | None = None, positions: ir.Value | None = None
    ) -> None:
        self.graph = model.graph
        self.ids = ids
        self.positions = positions
        self.values = values_of(self.graph)
        self.nodes = {node.name: node for node in self.graph}
        # found before new nodes lie between a product and the tokens that it multiplies
        self.products = {
            node.name: product for node in self.graph if (product := expert_product(node)) is not None
        }
        self.inner: dict[str, ir.Value] = {}
        """Member of a group of siblings -> its product with its ``down`` factor."""
        self.blocks: dict[tuple[object, ...], PairBlocks] = {}
        """How products assign tokens to experts -> the blocks of their pairs."""
        self._newest: dict[ir.Value, ir.Value] = {}
        self._after: ir.Node | None = None

    def site(self, site: MappedSite, slots: Mapping[str, ir.Value]) -> None:
        """Adds the branches of one site to the graph: ``slots`` maps each field to the value of its slot."""
        _SiteNodes(self, site, slots).add()

    def gather(self, site: MappedSite, field: str, bank: ir.Value) -> ir.Value:
        """Selects the rows of a bank for the batch: ``[slots, ...]`` gives ``[batch, ...]``."""
        self.move_to(None)
        return _SiteNodes(self, site, {}).op("Gather", f"{field}/rows", bank, self.ids, axis=0)

    def insert(self, node: ir.Node) -> None:
        """Inserts a node after the last one, or where :meth:`move_to` says."""
        if self._after is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(self._after, node)
        self._after = node

    def move_to(self, after: ir.Node | None) -> None:
        """Makes :meth:`insert` go on after a node; None is the beginning of the graph."""
        self._after = after

    def move_before(self, node: ir.Node) -> None:
        """Makes :meth:`insert` go on before ``node``."""
        position = self.graph.index(node)
        self._after = self.graph[position - 1] if position else None

    def latest(self, name: str) -> ir.Value:
        """Returns the value that has replaced the value of that name so far: a block and the layer that ends
        it may both be adapted.
        """
        value = self.values[name]
        while value in self._newest:
            value = self._newest[value]
        return value

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Replaces every use of ``old`` outside the new nodes by ``new``; a graph output keeps its name."""
        if new is old:  # the adapter changes only the input of the base layer
            return
        self._newest[old] = new
        # the new value may have another last axis: a head may have another width
        if new.shape is None and old.shape is not None:
            new.shape = ir.Shape([*list(old.shape)[:-1], None])
            new.type = old.type
        for node, index in old.uses():
            if not (node.name or "").startswith(ADDED):
                node.replace_input_with(index, new)
        if old.is_graph_output():
            new.shape = new.shape or old.shape
            new.type = old.type
            take_output(self.graph, old, new, "/base")


class _SiteNodes:
    """Adds the nodes of one site, named after it; ``slots`` maps each field to the value of its slot."""

    def __init__(self, emitter: Emitter, site: MappedSite, slots: Mapping[str, ir.Value]) -> None:
        self.emitter = emitter
        self.site = site
        self.slots = slots
        self.batched = emitter.ids is not None
        self.joined = site.flat and self.batched
        """Whether the site joins the tokens of rows that have their own slots, and so has to be split."""
        self.rank = 3 if self.joined else site.rank
        self.wide = self.batched and self.rank == 2
        """Whether the site's input is ``[batch, in]``. A batched weight then needs an extra axis: MatMul
        would broadcast wrongly without an error.
        """

    def add(self) -> None:
        """Adds the branches of the site."""
        emitter, site = self.emitter, self.site
        # an earlier site may have replaced this value, for instance a layer at the end of an adapted block
        y = emitter.latest(site.output)
        base = emitter.nodes[site.node]
        emitter.move_to(y.producer())
        if site.members:
            self._share_down(base.inputs[0])
        elif site.kind == "linear":
            self._change_layer(base, y)
        elif site.kind == "prompt":
            self._feed_prompt()
        elif site.kind == "lookup":
            self._change_output(y, lambda: self._look_up(base.inputs[1]))
        elif site.kind == "experts":
            self._change_experts(emitter.products[site.node], y)
        else:
            self._change_output(y, lambda: self._of_patches(base.inputs[0], y))

    def _change_layer(self, base: ir.Node, y: ir.Value) -> None:
        """Changes a linear layer, or the output of a block: its input before the node ``base``, and its
        output ``y``.
        """
        emitter = self.emitter
        site = self.site
        slots = self.slots
        # changes of the input have to come before the base's node, all others after it
        if site.flat and slots.keys() & _BEFORE:
            emitter.move_before(base)
        x = self._by_row("x", base.inputs[0])
        if "head" in slots:
            emitter.replace(y, self._join_rows("head", self._head(x)))
            return
        if slots.keys() & (_BEFORE | {"attended_keys"}):
            emitter.move_before(base)
            turned = self._place("turned", self._turn(x), x) if slots.keys() & _BEFORE else x
            turned = self._attend(turned) if "attended_keys" in slots else turned
            base.replace_input_with(0, self._join_rows("turned", turned))
        emitter.move_to(y.producer())
        plain = self._by_row("y", y)
        result = self._change(x, plain)
        for branch in BRANCHES.values():
            if f"{branch.name}_down" in slots:
                z = emitter.latest(site.entry or "") if branch.reads_input else result
                result = self.op("Add", f"{branch.name}/sum", result, self._branch(branch, z))
        emitter.replace(y, self._join_rows("y", self._place("placed", result, plain)))

    def _change(self, x: ir.Value, result: ir.Value) -> ir.Value:
        """Returns a layer's output after the adapter's additive change, scaling, mixing and shift."""
        slots = self.slots
        if "up" in slots:
            # siblings share one product with their down factors, which is computed already
            inner = (x, slots["down"]) if "down" in slots else (self.emitter.inner[self.site.path],)
            result = self.op("Add", "sum", result, self._product("up", *inner, slots["up"]))
        if "delta" in slots:
            result = self.op("Add", "delta/sum", result, self._product("delta", x, slots["delta"]))
        for route in ROUTES.values():
            if f"{route.name}_{route.leaf}" in slots:
                result = self.op("Add", f"{route.name}/sum", result, self._route(route, x))
        if "scale" in slots:
            result = self.op("Mul", "scale", result, self._lift(slots["scale"]))
        if "mix" in slots:
            result = self.op("Add", "mixed", result, self._product("mix", result, slots["mix"]))
        if "shift" in slots:
            result = self.op("Add", "shift", result, self._lift(slots["shift"]))
        return result

    def _change_output(self, y: ir.Value, change: Callable[[], ir.Value]) -> None:
        """Adds the ``change`` of a lookup or of patches to its output ``y``, and scales and shifts it."""
        result = y
        if self.slots.keys() & {"down", "delta"}:
            result = self.op("Add", "sum", y, change())
        for field, op in (("scale", "Mul"), ("shift", "Add")):
            if field in self.slots:
                result = self.op(op, field, result, self._over_places(self.slots[field], y))
        self.emitter.replace(y, result)

    def _feed_prompt(self) -> None:
        """Replaces the prompt inputs with which the graph was exported by the slots; expands them over the
        rows where rows cannot choose an adapter.
        """
        graph = self.emitter.graph
        self.emitter.move_to(None)
        for field, given in self.slots.items():
            slot = given
            if not self.batched:
                rows = self.op("Shape", f"{field}/rows", inputs_of(graph)["input_ids"], start=0, end=1)
                extents = self.op("Shape", f"{field}/extents", slot)
                shape = self.op("Concat", f"{field}/shape", rows, extents, axis=0)
                slot = self.op("Expand", f"{field}/each", slot, shape)
            # the graph was traced with the prompt as inputs, since a slot does not exist before export
            traced = inputs_of(graph)[field]
            traced.replace_all_uses_with(slot)
            graph.inputs.remove(traced)

    def _look_up(self, tokens: ir.Value) -> ir.Value:
        """Computes ``down[token] up`` for every token; in a bank indexes ``[slots, entries, r]`` by adapter
        and token at once.
        """
        down = self.slots["down"]
        if not self.batched:
            rows = self.op("Gather", "down/rows", down, tokens, axis=0)
        else:
            last = self._constant("last", [-1])
            shape = self.op("Shape", "tokens/shape", tokens)
            row_ids = self.op("Unsqueeze", "ids/each", self.emitter.ids, self._constant("axis", [1]))
            ids = self.op("Expand", "ids/tokens", row_ids, shape)
            pairs = [
                self.op("Unsqueeze", f"{name}/last", value, last)
                for name, value in (("ids", ids), ("tokens", tokens))
            ]
            rows = self.op("GatherND", "down/rows", down, self.op("Concat", "places", *pairs, axis=-1))
        return self.op("MatMul", "up", rows, self.slots["up"])

    def _change_experts(self, product: ExpertProduct, y: ir.Value) -> None:
        """Adds to the product of each token with each of its experts ``x down up + x delta``, with the
        matrices of the row's adapter and the expert.
        """
        emitter = self.emitter
        site = self.site
        op = self._op_under("experts")
        same = product.ends, product.tokens, product.indices, site.stack
        if same not in emitter.blocks:
            adapters = next(iter(self.slots.values()))
            emitter.blocks[same] = blocks_of(op, product, emitter.ids, adapters)
        blocks = emitter.blocks[same]
        result = y
        by_pair = op("Reshape", product.x, self._constant("by_pair", [-1, site.in_features]))
        x = op("Gather", by_pair, blocks.pairs, axis=0)
        for names in (("down", "up"), ("delta",)):
            matrices = [self.slots[field] for name in names if (field := f"{EXPERTS}{name}") in self.slots]
            change = x
            for matrix in matrices:
                change = op("MatMul", change, op("GatherND", matrix, blocks.chosen))
            if matrices:
                flat = op("Reshape", change, self._constant("flat", [-1, site.out_features]))
                own = op("Reshape", op("Gather", flat, blocks.places, axis=0), op("Shape", y))
                result = op("Add", result, own)
        emitter.replace(y, result)

    def _of_patches(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Computes ``patch down up + patch delta`` for every patch of an image, in the shape of the
        convolution's output.
        """
        slots = self.slots
        (_, channels, *sizes), (_, out, *grid) = x.shape, y.shape
        kernel = [size // count for size, count in zip(sizes, grid, strict=True)]
        cut = self._reshape("cut", x, [0, channels, grid[0], kernel[0], grid[1], kernel[1]])
        apart = self.op("Transpose", "apart", cut, perm=[0, 2, 4, 1, 3, 5])
        # [batch, rows, columns, channels, height, width]: a patch is the last three axes, as in the kernel
        patches = self._reshape("patches", apart, [0, grid[0] * grid[1], self.site.in_features])
        outer = None
        if "down" in slots:
            outer = self.op("MatMul", "up", self.op("MatMul", "down", patches, slots["down"]), slots["up"])
        if "delta" in slots:
            dense = self.op("MatMul", "delta", patches, slots["delta"])
            outer = dense if outer is None else self.op("Add", "delta/sum", outer, dense)
        added = self.op("Transpose", "by_channel", outer, perm=[0, 2, 1])
        return self._reshape("image", added, [0, out, *grid])

    def _share_down(self, x: ir.Value) -> None:
        """Multiplies ``x`` by all ``down`` factors of sibling sites side by side, and splits the product by
        site.
        """
        members = self.site.members
        wide = self._product("down", self._by_row("x", x), self.slots["down"])
        first = self.op("Split", "parts", wide, outputs=len(members), axis=-1, num_outputs=len(members))
        self.emitter.inner |= dict(zip(members, first.producer().outputs, strict=True))

    def _by_row(self, what: str, value: ir.Value) -> ir.Value:
        """Reshapes the tokens of a flat site from ``[batch * tokens, n]`` to ``[batch, tokens, n]`` where
        every row has its own slots.
        """
        if not self.joined:
            return value
        rows = self.op("Shape", f"{what}/rows", next(iter(self.slots.values())), start=0, end=1)
        last = self.op("Shape", f"{what}/width", value, start=-1)
        shape = self.op("Concat", f"{what}/shape", rows, self._constant("rest", [-1]), last, axis=0)
        return self.op("Reshape", f"{what}/by_row", value, shape)

    def _join_rows(self, what: str, value: ir.Value) -> ir.Value:
        """Joins the rows of a flat site again."""
        if not self.joined:
            return value
        last = self.op("Shape", f"{what}/out_width", value, start=-1)
        first = self._constant("rest", [-1])
        if self.site.rank > 2:
            first = self.op("Shape", f"{what}/joined_axes", self.emitter.values[self.site.input], end=-1)
        shape = self.op("Concat", f"{what}/out_shape", first, last, axis=0)
        return self.op("Reshape", f"{what}/joined", value, shape)

    def _place(self, what: str, changed: ir.Value, plain: ir.Value) -> ir.Value:
        """Selects the changed value at the positions where a row's adapter acts, and the plain value
        elsewhere.
        """
        if not self.site.positional:
            return changed
        last = self._constant("last", [-1])
        lifted = self.op("Unsqueeze", f"{what}/positions", self.emitter.positions, last)
        return self.op("Where", what, lifted, changed, plain)

    def _turn(self, x: ir.Value) -> ir.Value:
        """Returns the base layer's input as the adapter transforms it."""
        slots = self.slots
        if "pre" in slots:
            x = self.op("Mul", "pre", x, self._lift(slots["pre"]))
        changes = [
            self._product(name, x, *(slots[field] for field in fields))
            for name, fields in (("turn", ("turn",)), ("turn_up", ("turn_down", "turn_up")))
            if fields[0] in slots
        ]
        for number, change in enumerate(changes):
            x = self.op("Add", f"turned_{number}", x, change)
        return x

    def _attend(self, x: ir.Value) -> ir.Value:
        """Returns the input of an output projection plus the heads' attention to a prompt: ``gate softmax(q
        keys + absent) values``.
        """
        site = self.site
        slots = self.slots
        op = self._op_under("attended")
        assert site.heads is not None
        heads = site.heads
        queries = self.emitter.latest(site.heads.queries)

        def lift(field: str, axes: list[int]) -> ir.Value:
            return op("Unsqueeze", slots[field], self._constant(f"{field}/axes", axes))

        if len(queries.shape) == 3:
            apart = self._reshape("attended/heads", queries, [0, 0, heads.count, heads.width])
            queries = op("Transpose", apart, perm=[0, 2, 1, 3])
        shared = self._reshape("attended/shared", queries, [0, heads.key_heads, -1, heads.width])
        absent = lift("attended_absent", [1, 2]) if self.batched else slots["attended_absent"]
        weights = op("Softmax", op("Add", op("MatMul", shared, slots["attended_keys"]), absent), axis=-1)
        each = op("MatMul", weights, slots["attended_values"])
        by_head = self._reshape("attended/each", each, [0, heads.count, -1, heads.width])
        gated = op("Mul", by_head, lift("attended_gate", [2, 3] if self.batched else [1, 2]))
        by_token = op("Transpose", gated, perm=[0, 2, 1, 3])
        return op("Add", x, self._reshape("attended/joined", by_token, [0, 0, site.in_features]))

    def _branch(self, branch: Branch, z: ir.Value) -> ir.Value:
        """Computes ``act(norm(z) down + down_bias) up + up_bias``; the branch's name prefixes the fields."""
        slots = self.slots
        op = self._op_under(branch.name)
        product, vector = self._leaves_of(branch.name)
        if branch.normed:
            ones = self._constant("ones", np.ones(self.site.out_features, np.float32))
            z = op("LayerNormalization", z, ones, axis=-1, epsilon=EPSILON)
            z = op("Add", op("Mul", z, vector("norm_weight")), vector("norm_bias"))
        inner = op("Add", product(z, "down"), vector("down_bias"))
        added = product(ACTIVATION_NODES[branch.act](op, inner), "up")
        return op("Add", added, vector("up_bias")) if f"{branch.name}_up_bias" in slots else added

    def _route(self, route: RouteBranch, x: ir.Value) -> ir.Value:
        """Computes ``((x down) (g spread)) up``, where g is the softmax over the scores that reach the k-th
        largest.
        """
        slots = self.slots
        op = self._op_under(route.name)
        product, vector = self._leaves_of(route.name)
        narrow = product(x, "down")
        if route.scores == "fuse":
            perm = [0, 2, 1] if self.batched else [1, 0]
            turned = op("Transpose", slots[f"{route.name}_spread"], perm=perm)
            scores = self._product(f"{route.name}/answers", op("Mul", product(x, "query"), narrow), turned)
        else:
            scores = product(x, "keys")
        scores = op("Add", op("Abs", scores) if route.scores == "abs" else scores, vector("bias"))
        every = op("Shape", slots[f"{route.name}_bias"], start=-1)
        ranked = op("TopK", scores, every, outputs=2, axis=-1, largest=1, sorted=1)
        last = self._constant("last_axis", [-1])
        least = op("ReduceSum", op("Mul", ranked, vector("pick")), last, keepdims=1)
        kept = op("Where", op("GreaterOrEqual", scores, least), scores, self._constant("absent", ABSENT))
        weights = product(op("Softmax", kept, axis=-1), "spread")
        return product(op("Mul", narrow, weights), "up")

    def _leaves_of(self, prefix: str) -> tuple[Op, Op]:
        """Returns what multiplies by a matrix of a branch or a route, and what lifts one of its vectors, each
        by the name of the leaf.
        """

        def product(x: ir.Value, leaf: str) -> ir.Value:
            return self._product(f"{prefix}/{leaf}", x, self.slots[f"{prefix}_{leaf}"])

        def vector(leaf: str) -> ir.Value:
            return self._lift(self.slots[f"{prefix}_{leaf}"])

        return product, vector

    def _head(self, x: ir.Value) -> ir.Value:
        y = self._product("head", x, self.slots["head"])
        bias = self.slots.get("head_bias")
        return y if bias is None else self.op("Add", "bias", y, self._lift(bias))

    def _product(self, what: str, x: ir.Value, *matrices: ir.Value) -> ir.Value:
        """Multiplies ``x`` by one matrix after the other."""
        value = x
        if self.wide:
            value = self.op("Unsqueeze", f"{what}/wide", x, self._constant("axis", [1]))
        # one matrix for each row, over all axes between the batch and the positions
        axes = range(1, self.rank - 2) if self.batched else ()
        for number, matrix in enumerate(matrices):
            each = self._unsqueeze(matrix, axes, f"{what}/{number}/each", "between")
            value = self.op("MatMul", f"{what}/{number}", value, each)
        return self.op("Squeeze", f"{what}/flat", value, self._constant("axis", [1])) if self.wide else value

    def _lift(self, vector: ir.Value) -> ir.Value:
        """Reshapes a per-row vector ``[batch, n]`` to broadcast over ``[batch, positions, n]``."""
        axes = range(1, self.rank - 1) if self.batched else ()
        return self._unsqueeze(vector, axes, f"{vector.name}.lifted", f"{vector.name}.axes")

    def _over_places(self, vector: ir.Value, y: ir.Value) -> ir.Value:
        """Reshapes a vector of the outputs, one for each row in a bank, to broadcast over the tokens or
        patches of ``y``.
        """
        after = len(y.shape)
        if self.site.kind == "lookup":
            axes = range(1, after - 1) if self.batched else range(0)
        else:
            axes = range(2, after) if self.batched else range(1, after - 1)
        return self._unsqueeze(vector, axes, f"{vector.name}.over", f"{vector.name}.places")

    def _unsqueeze(self, value: ir.Value, axes: Sequence[int], what: str, where: str) -> ir.Value:
        """Adds axes to a value, if there are any; ``where`` names the constant."""
        return self.op("Unsqueeze", what, value, self._constant(where, list(axes))) if axes else value

    def _reshape(self, what: str, value: ir.Value, shape: list[int]) -> ir.Value:
        return self.op("Reshape", what, value, self._constant(f"{what}/shape", list(map(int, shape))))

    def _constant(self, name: str, numbers: ArrayLike) -> ir.Value:
        full = f"{ADDED}{self.site.path}/{name}"
        values = self.emitter.values
        if full not in values:
            array = np.asarray(numbers)
            if array.dtype == np.float32:
                array = convert(array, self.site.dtype, full)
            values[full] = add_initializer(self.emitter.graph, ir.tensor(array, name=full))
        return values[full]

    def _op_under(self, prefix: str) -> Op:
        """Returns an :data:`Op` whose nodes have this prefix and a number in their names."""

        def op(name: str, *inputs: ir.Value | float, outputs: int = 1, **attributes: object) -> ir.Value:
            values = [
                x
                if isinstance(x, ir.Value)
                else self._constant(str(x), np.float32(x) if isinstance(x, float) else [x])
                for x in inputs
            ]
            return self.op(
                name, f"{prefix}/{name}_{len(self.emitter.graph)}", *values, outputs=outputs, **attributes
            )

        return op

    def op(self, op: str, what: str, *inputs: ir.Value, outputs: int = 1, **attributes: object) -> ir.Value:
        """Adds a node of the operator ``op`` for ``what``, and returns its first output."""
        name = f"{ADDED}{self.site.path}/{what}"
        node = ir.node(op, list(inputs), attributes, name=name, num_outputs=outputs)
        for number, output in enumerate(node.outputs):
            output.name = f"{name}:{number}"
        self.emitter.insert(node)
        return node.outputs[0]


def rows_of(model: ir.Model) -> ir.SymbolicDim | int:
    """Returns the batch axis: the first axis of the model's first input."""
    inputs = model.graph.inputs
    return next((value for value in inputs if value.name in AXES), inputs[0]).shape[0]


def give_zeros(model: ir.Model, names: Collection[str]) -> None:
    """Makes inputs along tokens optional with zeros as the default: one zero is stored and expanded over all
    tokens.

    Requires: the graph has the input ``input_ids``, if it has any of the inputs ``names``.
    Ensures: these inputs have a default and a batch and a sequence of their own; fed, they work as before.
    """
    graph = model.graph
    for place, whole in enumerate(graph.inputs):
        if whole.name not in names or whole.name in graph.initializers:
            continue
        name = whole.name
        ids = inputs_of(graph)["input_ids"]
        given = _optional(name, np.zeros((1, 1), whole.dtype.numpy()), [f"{name}_batch", f"{name}_sequence"])
        graph.inputs[place] = given
        whole.name = f"{name}/whole"
        extents = ir.node("Shape", [ids], name=f"{name}/shape")
        expand = ir.node("Expand", [given, extents.outputs[0]], outputs=[whole], name=f"{name}/expand")
        graph.insert_before(graph[0], [extents, expand])
        graph.register_initializer(given)


def slot_input(model: ir.Model, name: str, default: np.ndarray, symbols: Sequence[Extent]) -> ir.Value:
    """Adds a graph input with a default, which ONNX Runtime calls an overridable initializer. ``symbols`` is
    its declared shape.
    """
    value = _optional(name, default, symbols)
    model.graph.inputs.append(value)
    model.graph.register_initializer(value)
    return value


def _optional(name: str, default: np.ndarray, symbols: Sequence[Extent]) -> ir.Value:
    tensor = ir.tensor(default, name=name)
    kind = ir.TensorType(tensor.dtype)
    return ir.Value(name=name, shape=ir.Shape(symbols), type=kind, const_value=tensor)
