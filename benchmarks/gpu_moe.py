"""ONNX Runtime's MoE operator as a grouped product over a bank of adapters: an expert is an adapter, its
two products are ``down`` and ``up`` with nothing between them (activation ``identity``), and the router is
one-hot by the adapter's number. The last expert is zero and stands for the base.

Beside it are the two forms of today: ``rows`` multiplies by factors that lie by row, as the engine's graph
does where adapterpack has no operator of its own, and ``gather`` takes them from the bank by number, as a
bank's portable graph does. MoE's output is as wide as its input, so other layers are padded to their wider
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import median

import numpy as np
import onnx
from decode import SIZES
from engine import timed
from gpu_plan import BoundGraph, Plan, Row, Table, error_of, ratio, tried, worst

from adapterpack.runtime.providers.device import Device

LAYERS = 8
"""In one graph, each with factors of its own; times are those of one."""
CONTESTANTS = ("rows", "gather", "moe")


def layer_graph(form: str, width: int, out: int, adapters: int, rank: int, dtype: str) -> bytes:
    """The changes of ``LAYERS`` layers of these widths for rows ``x``, ``[rows, 1, width]``."""
    wide = max(width, out)
    factors = {
        "rows": f"{dtype}[n,{width},{rank}] down#, {dtype}[n,{rank},{out}] up#",
        "gather": f"{dtype}[{adapters + 1},{width},{rank}] down#, {dtype}[{adapters + 1},{rank},{out}] up#",
        "moe": f"{dtype}[{adapters + 1},{rank},{wide}] down#, {dtype}[{adapters + 1},{wide},{rank}] up#",
    }[form]
    cut = "Slice(z#, zero, out, last)" if out < wide else "Identity(z#)"
    layer = {
        "rows": "h# = MatMul(x, down#)\n y# = MatMul(h#, up#)",
        "gather": "d# = Gather(down#, ids)\n u# = Gather(up#, ids)\nh# = MatMul(x, d#)\n y# = MatMul(h#, u#)",
        "moe": 'z# = com.microsoft.MoE<k = 1, activation_type = "identity", normalize_routing_weights = 1>'
        f"(padded, router, down#, , up#)\n y# = {cut}",
    }[form]
    start = ""
    if form == "moe":
        kind = onnx.TensorProto.FLOAT16 if dtype == "float16" else onnx.TensorProto.FLOAT
        padding = f"pads = Constant<value_ints = [0, 0, 0, 0, 0, {wide - width}]>()\n padded = Pad(x, pads)"
        start = f"""
            experts = Constant<value_int = {adapters + 1}>()
            ends = Constant<value_floats = [0.0, 1.0]>()
            hot = OneHot(ids, experts, ends)
            router = Cast<to = {kind}>(hot)
            zero = Constant<value_ints = [0]>()
            out = Constant<value_ints = [{out}]>()
            last = Constant<value_ints = [2]>()
            {padding if wide > width else "padded = Identity(x)"}"""
    inputs = ", ".join(factors.replace("#", str(number)) for number in range(LAYERS))
    outputs = ", ".join(f"{dtype}[n,1,{out}] y{number}" for number in range(LAYERS))
    nodes = "\n".join(layer.replace("#", str(number)) for number in range(LAYERS))
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        layers({dtype}[n,1,{width}] x, int64[n] ids, {inputs}) => ({outputs}) {{ {start} {nodes} }}"""
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def feeds_of(
    form: str, x: np.ndarray, ids: np.ndarray, banks: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The inputs of a form. ``banks`` are the factors ``[adapters + 1, ...]`` of each layer, those of the
    base last, which is -1 in ``ids``.
    """
    feeds = {"x": x, "ids": ids}
    for number, (down, up) in enumerate(banks):
        if form == "rows":
            down, up = down[ids], up[ids]  # noqa: PLW2901
        elif form == "moe":
            (count, width, rank), out = down.shape, up.shape[2]
            first = np.zeros((count, rank, max(width, out)), down.dtype)
            second = np.zeros((count, max(width, out), rank), up.dtype)
            first[..., :width], second[:, :out] = down.swapaxes(1, 2), up.swapaxes(1, 2)
            down, up = first, second  # noqa: PLW2901
        feeds |= {f"down{number}": down, f"up{number}": up}
    return feeds


def measure(plan: Plan) -> Table:
    """Milliseconds of a layer's change in each form, and the largest error of MoE's."""
    sizes, rank = SIZES[plan.args.size], plan.args.rank
    hidden, between = sizes["hidden_size"], sizes["intermediate_size"]
    notes = list[str]()
    rows = [
        {"steps": kind, **_measured(device, shape, plan, notes)}
        for kind, device in plan.devices.items()
        for shape in product(
            [(hidden, hidden), (hidden, between), (between, hidden)],
            plan.args.adapters,
            (rank, 4 * rank),
            plan.args.rows,
        )
    ]
    return Table(rows, notes)


def _measured(
    device: Device, shape: tuple[tuple[int, int], int, int, int], plan: Plan, notes: list[str]
) -> Row:
    (width, out), adapters, rank, count = shape
    # the CPU's kernel has no other type
    dtype, name = (np.float16, "float16") if plan.on_card else (np.float32, "float")
    rng = np.random.default_rng(0)

    def drawn(scale: float, *size: int) -> np.ndarray:
        return rng.normal(0, scale, size).astype(dtype)

    x, ids = drawn(1, count, 1, width), np.arange(count) % (adapters + 1)
    ids[ids == adapters] = -1
    banks = [
        (drawn(0.02, adapters + 1, width, rank), drawn(0.02, adapters + 1, rank, out)) for _ in range(LAYERS)
    ]
    for factors in banks:
        for one in factors:
            one[-1] = 0
    outputs = {f"y{number}": ((count, 1, out), dtype) for number in range(LAYERS)}
    graphs = {}
    for form in CONTESTANTS:
        graph = layer_graph(form, width, out, adapters, rank, name)
        feeds = feeds_of(form, x, ids, banks)
        made = tried(notes, form, lambda graph=graph, feeds=feeds: BoundGraph(graph, device, feeds, outputs))
        if made is not None:
            graphs[form] = made
    times = {form: median(one) / LAYERS for form, one in timed(graphs, plan.args.runs).items()}
    wide = x.astype(np.float64)
    errors = {
        form: worst(
            [
                error_of(graph.result(f"y{number}"), wide @ down[ids].astype(np.float64) @ up[ids])
                for number, (down, up) in enumerate(banks)
            ]
        )
        for form, graph in graphs.items()
    }
    return {
        "layer": f"{width}>{out}",
        "adapters": adapters,
        "rank": rank,
        "rows": count,
        **{f"{form} ms": times.get(form) for form in CONTESTANTS},
        "moe/rows": ratio(times.get("moe"), times.get("rows")),
        "moe/gather": ratio(times.get("moe"), times.get("gather")),
        **{f"{form} error": errors.get(form) for form in CONTESTANTS},
    }
