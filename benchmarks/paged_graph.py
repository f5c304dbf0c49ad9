"""PagedAttention in place of GroupQueryAttention in the engine's graph: keys and values in blocks of a
pool, which a table names for each row, and the tokens of all rows packed one after another.

Operator:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.PagedAttention.
Only ONNX Runtime's CUDA provider has a kernel, in float16 and bfloat16. :func:`in_standard_operators` puts
what its documentation says in its place, so that the rest of such a graph runs and is compared anywhere.

What the engine would need beside this exchange when it opens the graph: a pool ``[blocks, tokens, heads,
width]`` in place of one by row, the blocks of each row, and the bounds on the host. Rows would then grow
block by block, share the blocks of a common beginning without a copy, and keep their place when another one
leaves. Tokens of several rows would be one pass, as `RaggedAttention` reads them on the CPU, where adapters
are named by token.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import onnx_ir as ir

from adapterpack.graph_passes.constants import NewNodes, constant

LENGTHS = "cumulative_sequence_length"
"""The input ``[rows + 1]``: where the tokens of each row begin in the pass, and how many there are in all."""
PAST_LENGTHS = "past_seqlens"
"""The input ``[rows]``: how many tokens each row has in its blocks."""
TABLE = "block_table"
"""The input ``[rows, most blocks]`` with the numbers of each row's blocks."""
BOUNDS = "attention_metadata"
"""The input ``[2]``, on the host: the most new tokens of a row, and the most tokens that a row has after
the pass. Without it each attention asks the device and waits, which cannot be captured.
"""
_INPUTS = {LENGTHS: ["row_ends"], PAST_LENGTHS: ["rows"], TABLE: ["rows", "most_blocks"], BOUNDS: [2]}
_KEPT = (
    "num_heads",
    "kv_num_heads",
    "scale",
    "softcap",
    "local_window_size",
    "do_rotary",
    "rotary_interleaved",
)
_PLAIN = {"causal": 1, "smooth_softmax": 0, "qk_output": 0, "kv_cache_bit_width": 0}
"""What other attributes must be, and are where a node lacks them."""
_SINKS = 11
_LAST = np.iinfo(np.int64).max


def replace_by_paged(model: ir.Model) -> None:
    """Replaces every GroupQueryAttention of the engine's graph. Caches become pools ``[blocks, tokens, heads,
    width]``, and the inputs with the lengths of rows become those that the operator reads.

    Raises:
        ValueError: an attention has something that the operator lacks, or something else reads a cache or a
            length.
    """
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    if not nodes:
        raise ValueError("the graph has no GroupQueryAttention")
    inputs = {name: ir.val(name, ir.DataType.INT32, shape) for name, shape in _INPUTS.items()}
    before = {value: None for node in nodes for value in node.inputs[5:7]}
    for node in nodes:
        _replace(model, node, inputs)
    for value in before:
        if value.uses():
            raise ValueError(f"something else than an attention reads {value.name}")
        model.graph.inputs.remove(value)
    model.graph.inputs.extend(inputs.values())


def _replace(model: ir.Model, node: ir.Node, given: dict[str, ir.Value]) -> None:
    inputs = [*node.inputs, *[None] * (14 - len(node.inputs))]
    caches = inputs[3:5]
    if (
        any(one is not None for one in (*inputs[9:_SINKS], *inputs[_SINKS + 1 :]))
        or any(node.attributes.get_int(name, value) != value for name, value in _PLAIN.items())
        or not all(cache.is_graph_input() and len(cache.uses()) == 1 for cache in caches)
    ):
        raise ValueError(f"PagedAttention cannot stand for {node.name}")
    new = NewNodes(f"{node.name}/paged")

    def packed(name: str, value: ir.Value | None) -> ir.Value | None:
        """``[batch, tokens, width]`` as ``[batch tokens, width]``."""
        if value is None:
            return None
        shape = np.array([-1, value.shape[2]])
        return new("Reshape", name, value, constant(model, f"paged/{shape}", shape))

    states = [packed(name, value) for name, value in zip("qkv", inputs[:3], strict=True)]
    tables = [given[name] for name in (LENGTHS, PAST_LENGTHS, TABLE)]
    paged = ir.node(
        "PagedAttention",
        [*states, *caches, *tables, *inputs[7:9], None, inputs[_SINKS], *[None] * 4, given[BOUNDS]],
        {name: node.attributes[name] for name in _KEPT if name in node.attributes},
        domain="com.microsoft",
        name=node.name,
        num_outputs=3,
    )
    new.nodes.append(paged)
    batch = new("Shape", "batch", inputs[0], end=2)
    shape = new("Concat", "shape", batch, constant(model, "paged/rest", np.array([-1])), axis=0)
    out = new("Reshape", "out", paged.outputs[0], shape)
    node.graph.insert_before(node, new.nodes)
    for old, made in zip(node.outputs, (out, *paged.outputs[1:]), strict=True):
        _take_place(old, made)
    node.graph.remove(node, safe=True)
    for cache in (*caches, *paged.outputs[1:]):
        cache.shape = ir.Shape(["blocks", "block", caches[0].shape[1], caches[0].shape[3]])


def in_standard_operators(model: ir.Model) -> None:
    """Replaces every PagedAttention of such a graph in float32 by what its documentation says: each token is
    written to its place in the blocks of its row, and attends to that row up to itself.

    Raises:
        ValueError: an attention has a window, a cap, sinks, or does not turn whole heads by halves.
    """
    for node in [node for node in model.graph if node.op_type == "PagedAttention"]:
        attributes = node.attributes
        if (
            attributes.get_float("softcap", 0.0)
            or attributes.get_int("local_window_size", -1) > 0
            or attributes.get_int("rotary_interleaved", 0)
            or node.inputs[_SINKS] is not None
            or (attributes.get_int("do_rotary", 0) and 2 * node.inputs[8].shape[1] != node.inputs[3].shape[3])
        ):
            raise ValueError(f"{node.name} has a window, a cap, sinks, or another rotation")
        _expand(model, node)


class _Documented(NewNodes):
    """The nodes that stand for one PagedAttention. Its tokens are ``[tokens, heads, width]``."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        super().__init__(f"{node.name}/documented")
        self.model, self.node = model, node
        self.heads, self.shared = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        self.pools, self.width = node.inputs[3:5], node.inputs[3].shape[3]

    def whole(self, *numbers: int) -> ir.Value:
        """A constant vector."""
        return constant(self.model, f"documented/{numbers}", np.array(numbers))

    def scalar(self, number: int) -> ir.Value:
        """A constant number."""
        return constant(self.model, f"documented/{number}", np.array(number))

    def slice(self, name: str, value: ir.Value, start: int, stop: int, axis: int = 0) -> ir.Value:
        """A part of a value."""
        return self("Slice", name, value, *map(self.whole, (start, stop, axis)))

    def column(self, name: str, vector: ir.Value) -> ir.Value:
        """A vector as a column."""
        return self("Unsqueeze", name, vector, self.whole(1))

    def extent(self, name: str, value: ir.Value, axis: int) -> ir.Value:
        """How long a value is along an axis."""
        return self("Gather", name, self("Shape", f"{name}_shape", value), self.scalar(axis))

    def range(self, name: str, stop: ir.Value) -> ir.Value:
        """The numbers from 0 on."""
        return self("Range", name, self.scalar(0), stop, self.scalar(1))

    def states(self) -> list[ir.Value]:
        """Queries, keys and values, which may lie in one tensor."""
        counts = (self.heads, self.shared, self.shared)
        if self.node.inputs[1] is not None:
            return [
                self("Reshape", name, value, self.whole(0, count, self.width))
                for name, value, count in zip("qkv", self.node.inputs[:3], counts, strict=True)
            ]
        joined = self("Reshape", "joined", self.node.inputs[0], self.whole(0, sum(counts), self.width))
        ends = pairwise((0, *accumulate(counts)))
        return [self.slice(name, joined, *part, axis=1) for name, part in zip("qkv", ends, strict=True)]

    def places(self) -> tuple[ir.Value, ir.Value]:
        """The row of each token and its position there, ``[tokens]``."""
        lengths, past = (
            self("Cast", name, value, to=ir.DataType.INT64)
            for name, value in zip(("lengths", "past"), self.node.inputs[5:7], strict=True)
        )
        tokens = self.range("tokens", self.extent("count", self.node.inputs[0], 0))
        ends = self.slice("ends", lengths, 1, _LAST)
        behind = self("GreaterOrEqual", "behind", self.column("token", tokens), ends)
        passed = self("Cast", "passed", behind, to=ir.DataType.INT64)
        rows = self("ReduceSum", "rows", passed, self.whole(1), keepdims=0)
        begin = self("Gather", "begin", self.slice("begins", lengths, 0, -1), rows)
        within = self("Sub", "within", tokens, begin)
        return rows, self("Add", "places", self("Gather", "before", past, rows), within)

    def rotated(self, name: str, states: ir.Value, places: ir.Value) -> ir.Value:
        """Tokens turned by their positions, the first half of a head against the second."""
        cos, sin = (
            self.column(f"{name}_{part}", self("Gather", f"{name}_{part}_at", values, places))
            for part, values in zip(("cos", "sin"), self.node.inputs[8:10], strict=True)
        )
        half = self.width // 2
        low, high = (
            self.slice(f"{name}_from{start}", states, start, start + half, axis=2) for start in (0, half)
        )
        pairs = {"lc": (low, cos), "hs": (high, sin), "hc": (high, cos), "ls": (low, sin)}
        parts = [self("Mul", f"{name}_{key}", *pair) for key, pair in pairs.items()]
        halves = self("Sub", f"{name}_low", *parts[:2]), self("Add", f"{name}_high", *parts[2:])
        return self("Concat", f"{name}_turned", *halves, axis=2)

    def slots(self, rows: ir.Value) -> ir.Value:
        """The numbers of all slots of each token's row, ``[tokens, slots]``, in the order of positions."""
        table = self("Cast", "table", self.node.inputs[7], to=ir.DataType.INT64)
        size = self.extent("size", self.pools[0], 1)
        firsts = self("Mul", "firsts", self("Gather", "blocks", table, rows), size)
        starts = self("Unsqueeze", "starts", firsts, self.whole(2))
        every = self("Add", "every", starts, self.range("lanes", size))
        return self("Reshape", "slots", every, self.whole(0, -1))

    def held(
        self, name: str, pool: ir.Value, states: ir.Value, slots: ir.Value, places: ir.Value, after: ir.Value
    ) -> ir.Value:
        """Writes the tokens into a pool, which is ``after`` then, and reads all slots of their rows."""
        slot = self("GatherElements", f"{name}_slot", slots, self.column(f"{name}_place", places), axis=1)
        flat = self("Reshape", f"{name}_flat", pool, self.whole(-1, self.shared, self.width))
        written = self("ScatterND", f"{name}_written", flat, slot, states)
        shape = self("Shape", f"{name}_shape", pool)
        _take_place(after, self("Reshape", f"{name}_pool", written, shape))
        return self("Gather", f"{name}_held", written, slots)

    def attention(self, q: ir.Value, keys: ir.Value, values: ir.Value, places: ir.Value) -> ir.Value:
        """Attention of groups of heads to the slots of their row up to their own."""
        grouped = self(
            "Reshape", "grouped", q, self.whole(0, self.shared, self.heads // self.shared, self.width)
        )
        scale = np.float32(self.node.attributes.get_float("scale", 0.0) or self.width**-0.5)
        products = self("Einsum", "products", grouped, keys, equation="tkgd,tlkd->tkgl")
        scores = self("Mul", "scores", products, constant(self.model, f"{self.prefix}scale", scale))
        reach = self.range("reach", self.extent("most", keys, 1))
        later = self("Greater", "later", reach, self("Reshape", "upto", places, self.whole(-1, 1, 1, 1)))
        low = constant(self.model, "documented/low", np.float32(-1e30))
        weights = self("Softmax", "weights", self("Where", "visible", later, low, scores), axis=-1)
        mixed = self("Einsum", "mixed", weights, values, equation="tkgl,tlkd->tkgd")
        return self("Reshape", "out", mixed, self.whole(0, self.heads * self.width))


def _expand(model: ir.Model, node: ir.Node) -> None:
    new = _Documented(model, node)
    q, k, v = new.states()
    rows, places = new.places()
    if node.attributes.get_int("do_rotary", 0):
        q, k = new.rotated("q", q, places), new.rotated("k", k, places)
    slots = new.slots(rows)
    keys, values = (
        new.held(name, pool, states, slots, places, after)
        for name, pool, states, after in zip("kv", new.pools, (k, v), node.outputs[1:], strict=True)
    )
    out = new.attention(q, keys, values, places)
    node.graph.insert_before(node, new.nodes)
    _take_place(node.outputs[0], out)
    node.graph.remove(node, safe=True)


def _take_place(old: ir.Value, new: ir.Value) -> None:
    new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
