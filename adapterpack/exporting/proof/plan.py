"""Plans the proof of an export before anything is built: how much of it runs the whole model."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...base import SHORT, Checkpoint, LongRows
from ...bundle import PROOFS, ProofReport
from ...errors import Unsupported
from ...pack import Pack
from ...readable import things
from ..frontends.base import ExportSource
from ..tracing.example_inputs import config_of
from .few_layers import LayerStack, stack_of
from .long_rows import plan_long_rows

_FULL = 1 << 30
"""Models up to this many bytes of float32 are proved in full by default."""
_ADAPTERS = 4
"""The most adapters of a sample."""
_LEAST = 2
"""The fewest layers of a copy: one follows another."""


class ProofPlan(NamedTuple):
    """The proof of an export: its ``depth``, the ``rows`` of a full one, and for ``layers`` the ``stack``, of
    which the first ``kept`` layers are proved. ``fits``: the whole graph and the model in torch fit into
    memory; ``direct``: the graph is written in codes, so that there is no float graph to compare.
    """

    depth: str = PROOFS[0]
    rows: LongRows = SHORT
    stack: LayerStack | None = None
    fits: bool = True
    direct: bool = False

    @property
    def whole(self) -> bool:
        """Whether the whole graph is compared with torch."""
        return self.fits and not self.direct

    @property
    def small_rows(self) -> LongRows:
        """The long rows of the copy of a few layers."""
        return LongRows(whole=(*(self.rows.whole if self.depth == "layers" else ()), *self.rows.few))

    def describe(self, packs: Sequence[Pack]) -> str:
        """Describes the plan in a line."""
        if self.depth == "none":
            return "nothing will be proved: --proof none"
        if self.stack is None:
            return "the proof will be in full: the whole graph against torch"
        what = "the whole graph on short rows" if self.whole else "of the whole graph the places of weights"
        return (
            f"the proof will be by layers: {self.stack.kept} of {self.stack.layers} at full width against "
            f"torch, {what}, {len(sample(packs))} of {things(len(packs), 'adapter')}; --proof full proves all"
        )

    def report(self, packs: Sequence[Pack], placed: int | None = None) -> ProofReport:
        """Returns the manifest's entry: what was proved of a bundle with these packs."""
        if self.stack is None:
            return {"depth": self.depth}
        places: ProofReport = (
            {"depth": self.depth} if placed is None else {"depth": self.depth, "placed": placed}
        )
        return {
            **places,
            "layers": self.stack.kept,
            "of": self.stack.layers,
            "adapters": [pack.name for pack in sample(packs)],
            "whole": "torch" if placed is None else "places",
        }


def plan_proof(source: ExportSource, depth: str | None, direct: bool) -> ProofPlan:
    """Plans the proof of this source's graph, by default in full for small models and by layers for large
    ones. ``direct``: no float graph of the whole model is written.

    Raises:
        Unsupported: a proof by layers is requested for a model that is not one stack of layers.
    """
    if depth == "none":
        return ProofPlan(depth, direct=direct)
    base = Checkpoint(source.folder)
    numbers = count_numbers(base)
    rows = plan_long_rows(source)
    if depth == "full" or (depth is None and 4 * numbers <= _FULL):
        return ProofPlan("full", rows)
    # a prompt holds the keys and values of all layers in one tensor
    usable = (
        source.file is None
        and len(source.task.parts) == 1
        and "input_ids" in source.task.inputs
        and all(pack.method.kind != "prompt" for pack in source.packs)
    )
    stack = stack_of(base, config_of(source.folder).to_dict()) if usable else None
    if stack is None or max(_LEAST, stack.kept) >= stack.layers:
        if depth is None:
            return ProofPlan("full", rows)
        raise Unsupported(
            "a proof by layers needs a model of one stack of layers that its checkpoint names, and adapters "
            "that change one layer at a time",
            where=source.folder,
            found=source.task.name
            if stack is None
            else f"{stack.layers} layers, of which {stack.kept} show all kinds",
            remedy="export with --proof full",
        )
    stack = stack._replace(kept=max(_LEAST, stack.kept))
    stored = sum(info.nbytes for info in base.tensors.values())
    # torch maps a checkpoint in halves, and ONNX Runtime the graph
    return ProofPlan("layers", rows, stack, stored + 4 * numbers <= free_memory(), direct)


def sample(packs: Sequence[Pack]) -> list[Pack]:
    """Returns the packs that a proof by layers compares: the first, the last, and the first of each method,
    at most four, in their order.
    """
    methods = {pack.method.name: pack for pack in reversed(packs)}
    chosen = [*packs[:1], *packs[-1:], *methods.values()]
    names = list(dict.fromkeys(pack.name for pack in chosen))[:_ADAPTERS]
    return [pack for pack in packs if pack.name in names]


def count_numbers(base: Checkpoint) -> int:
    """Returns how many numbers the tensors of a checkpoint have."""
    return sum(math.prod(info.shape) for info in base.tensors.values())


def free_memory() -> int:
    """Returns the bytes of memory that this machine can give to a process, without those that it swaps."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
