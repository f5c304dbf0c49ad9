"""Steps of the engine's graph of the base with PagedAttention beside GroupQueryAttention, at several lengths.

The same keys and values lie in one buffer for each row, or in blocks of a pool in random order. Without a
card the operator has no kernel: then ONNX Runtime's reason is in the notes, nothing of it is timed, and
what its documentation says is computed in its place, so that ``difference`` still compares both graphs.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from engine import timed
from gpu_plan import BoundGraph, Plan, Row, Table, error_of, ratio, tried, worst
from paged_graph import BOUNDS, LENGTHS, PAST_LENGTHS, TABLE, in_standard_operators, replace_by_paged

from adapterpack.bundle import CACHE_LENGTHS, DECODER, LOGITS_POSITIONS, PAST, PRESENT, graph_file
from adapterpack.bundle.decoder_graph import LONGEST
from adapterpack.runtime.providers.device import Device

BLOCKS = (256, 16)
"""Tokens of a block. FlashAttention reads blocks from 256 on where heads are up to 64 wide; smaller ones
take other kernels.
"""


class Rows:
    """Rows in the middle of decoding: random tokens, and random keys and values of ``context`` tokens, a
    few less in each further row.
    """

    def __init__(self, graph: ir.Graph, count: int, context: int) -> None:
        rng = np.random.default_rng(0)
        self.count, self.length = count, -(-(context + 1) // max(BLOCKS)) * max(BLOCKS)
        self.past = np.array([context - row % 8 for row in range(count)], np.int32)
        self.ids = rng.integers(1, 60, (count, 1))
        self.caches = {
            value.name: rng.standard_normal((count, value.shape[1], self.length, value.shape[3])).astype(
                value.dtype.numpy()
            )
            for value in graph.inputs
            if value.name.startswith(PAST)
        }

    @property
    def _tokens(self) -> dict[str, np.ndarray]:
        kept = np.zeros((self.count, 1), np.int64)
        return {
            "input_ids": self.ids,
            "position_ids": self.past[:, None].astype(np.int64),
            LOGITS_POSITIONS: kept,
        }

    def by_row(self, fixed: bool) -> dict[str, np.ndarray]:
        """The inputs of GroupQueryAttention; captured steps take every row for as long as its buffer."""
        longest = self.length if fixed else int(self.past.max()) + 1
        return {**self._tokens, CACHE_LENGTHS: self.past, LONGEST: np.array(longest, np.int32), **self.caches}

    def in_blocks(self, size: int) -> dict[str, np.ndarray]:
        """The inputs of PagedAttention with blocks of ``size`` tokens."""
        each = self.length // size
        table = np.random.default_rng(1).permutation(self.count * each).astype(np.int32)
        pools = {}
        for name, cache in self.caches.items():
            rows, heads, _, width = cache.shape
            pools[name] = np.empty((rows * each, size, heads, width), cache.dtype)
            pools[name][table] = cache.swapaxes(1, 2).reshape(-1, size, heads, width)
        return {
            **self._tokens,
            **pools,
            LENGTHS: np.arange(self.count + 1, dtype=np.int32),
            PAST_LENGTHS: self.past,
            TABLE: table.reshape(self.count, each),
            BOUNDS: np.array([1, self.length], np.int32),
        }


def paged_model(folder: Path, documented: bool = False) -> bytes:
    """The graph of a bundle's engine with PagedAttention, or ``documented`` with standard operators for
    it.
    """
    model = ir.load(folder / graph_file(DECODER))
    replace_by_paged(model)
    if documented:
        in_standard_operators(model)
    written = bytes(ir.to_proto(model).SerializeToString())
    # the checker wants weights beside the file; as inputs it takes their types alone
    for weight in [
        one for one in model.graph.initializers.values() if isinstance(one.const_value, ir.ExternalTensor)
    ]:
        model.graph.initializers.pop(weight.name)
        weight.type, weight.shape = ir.TensorType(weight.const_value.dtype), weight.const_value.shape
        weight.const_value = None
        model.graph.inputs.append(weight)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return written


def step(
    graph: Path | bytes, folder: Path, device: Device, feeds: dict[str, np.ndarray], logits: tuple[Any, Any]
) -> BoundGraph:
    """One step of these rows, whose caches are written in place."""
    caches = {PRESENT + name.removeprefix(PAST): name for name in feeds if name.startswith(PAST)}
    on_host = {LONGEST, BOUNDS}
    given = None if isinstance(graph, Path) else folder
    outputs = {"logits": logits}
    return BoundGraph(graph, device, feeds, outputs, in_place=caches, on_host=on_host, folder=given)


def measure(plan: Plan) -> Table:
    """Milliseconds of a step with each operator, and the largest difference of logits."""
    folder = plan.bundle("float16" if plan.on_card else "float32", "slotless")
    graph = ir.load(folder / graph_file(DECODER)).graph
    notes, rows = list[str](), list[Row]()
    positions = next(node.inputs[7].shape[0] for node in graph if node.op_type == "GroupQueryAttention")
    for context in plan.args.contexts:
        if context >= positions:
            notes.append(f"{context} tokens are left out: the model has {positions} positions")
            continue
        for count in sorted({1, max(plan.args.rows)}):
            for kind, device in plan.devices.items():
                found = _measured(folder, graph, device, Rows(graph, count, context), plan, notes)
                rows.append({"steps": kind, "context": context, "rows": count, **found})
    return Table(rows, notes)


def _measured(folder: Path, graph: ir.Graph, device: Device, rows: Rows, plan: Plan, notes: list[str]) -> Row:
    out = next(value for value in graph.outputs if value.name == "logits")
    logits = (rows.count, 1, out.shape[2]), out.dtype.numpy()
    plain = folder / graph_file(DECODER)
    feeds = rows.by_row(bool(device.capture))
    steps = {"by row": step(plain, folder, device, feeds, logits)}
    differences = []
    for size in BLOCKS:
        feeds = rows.in_blocks(size)

        def opened(documented: bool, feeds: dict[str, np.ndarray] = feeds) -> BoundGraph:
            return step(paged_model(folder, documented), folder, device, feeds, logits)

        made = tried(notes, "PagedAttention", lambda opened=opened: opened(False))
        if made is not None:
            steps[f"blocks of {size}"] = made
        elif not plan.on_card:
            made = opened(True)
            if (note := "The difference is that of its documentation's formula") not in notes:
                notes.append(note)
        if made is not None:
            differences.append(
                error_of(made.result("logits"), steps["by row"].result("logits").astype(float))
            )
    times = {name: median(found) for name, found in timed(steps, plan.args.runs).items()}
    names = [f"blocks of {size}" for size in BLOCKS]
    return {
        "by row ms": times["by row"],
        **{f"{name} ms": times.get(name) for name in names},
        **{f"{name}/by row": ratio(times.get(name), times["by row"]) for name in names},
        "difference": worst(differences),
    }
