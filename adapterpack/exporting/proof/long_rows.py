"""Proves rows on both sides of the lengths at which a model computes differently, each against torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...adapter_methods import Tensors
from ...base import Checkpoint, LongRows, rows_past, thresholds_of
from ...bundle import PRESENT
from ...engine_graph.compare import in_pieces, largest_difference, require_close, takes_much
from ...io import Config, Json
from ...pack import Pack
from ...runtime import Session, context_length, context_of
from ...runtime.sessions.generate import virtual_tokens
from ...slots import virtual_room
from ...tasks import Arrays
from ..frontends.base import ExportSource
from ..tracing.example_inputs import config_of, example
from .few_layers import stack_of
from .parity_runs import real_positions, row_of, run_alone, run_graph, run_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHORT = 7
"""Tokens of the short row that runs with the long ones."""
_KEPT = 64
"""Positions of a long row to compare if all of its logits would take too much memory."""


def plan_long_rows(source: ExportSource) -> LongRows:
    """Plans the long rows for the proof of this source's graph."""
    if "input_ids" not in source.task.inputs:
        return LongRows()
    config = config_of(source.folder).to_dict()
    checkpoint = Checkpoint(source.folder)
    weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values() if len(info.shape) > 1)
    stack = None if source.file or source.task.has_encoder else stack_of(checkpoint, config)
    layers, kept = (1, 1) if stack is None else (stack.layers, stack.kept)
    return rows_past(config, weights, layers, kept, context_length(config, source.folder))


def prove_long_rows(
    session: Session,
    source: ExportSource,
    model: PreTrainedModel,
    lengths: Sequence[int],
    tolerance: float,
    left: bool,
) -> Json:
    """Runs rows of these ``lengths`` as one ragged batch with a short row, with every adapter in turn, and
    one more token on their caches where the model generates. Returns the largest difference from torch on
    each row alone, as a share of the largest output, and the lengths. Rows that would take too much memory
    together run one after the other, in pieces.

    Raises:
        ParityError: a row differs.
    """
    task = source.task
    config = config_of(source.folder)
    packs: dict[str | None, Pack | None] = {None: None, **{pack.name: pack for pack in source.packs}}
    rules = [rule for rule in {pack.acts for pack in source.packs} if rule is not None]
    most = context_of(session)
    if most is not None:
        virtual = max(
            virtual_room(session.bundle.sites),
            *(virtual_tokens(session, pack) for pack in session.packs.values()),
            0,
        )
        most -= virtual + task.generates + sum(len(rule.woven((1, 1))) - 2 for rule in rules)
        lengths = sorted({max(1, min(length, most)) for length in lengths})
    lengths = [min(_SHORT, *lengths), *lengths]
    batch = example(
        task,
        config,
        lengths,
        acts=rules,
        bare=range(len(lengths)),
        left=left,
        seed=11,
        model=lambda: model,
        answer=lengths[-1],
    )
    names = [list(packs)[row % len(packs)] for row in range(len(lengths))]
    rows = [row_of(batch, row) for row in range(len(lengths))]
    much = task.pads_left and takes_much(session, len(rows), lengths[-1])
    expected = run_alone(task, model, rows, [packs[name] for name in names], _KEPT if much else 0)
    outputs = _by_graph(session, batch, rows, names, much)
    scale = max(1.0, *(float(np.abs(array).max()) for one in expected for array in one.values()))
    worst = 0.0
    for length, answer, right in zip(lengths, outputs, expected, strict=True):
        error = _error(answer, right, much, session.bundle.dtype)
        why = f"the graph disagrees with torch for {_describe(config.to_dict(), length, lengths)}"
        worst = max(worst, require_close(why, error, scale, tolerance, session.folder.name))
    return {"rows": list(lengths[1:]), "max_relative": worst}


def _by_graph(
    session: Session, batch: Arrays, rows: Sequence[Arrays], names: Sequence[str | None], much: bool
) -> list[Arrays]:
    """Returns the graph's outputs for each row, from one batch; from separate runs if the batch takes too
    much memory or rows cannot choose adapters.
    """
    if much:
        return [
            run_step(session, row, list(in_pieces(session, row["input_ids"], name))[-1], name)
            for row, name in zip(rows, names, strict=True)
        ]
    # with a sliding window, padding must not follow a prompt
    prompted = any(virtual_tokens(session, pack) for pack in session.packs.values())
    if not any(names) or (session.bundle.mode == "bank" and not prompted):
        # a folded bundle has no adapter name for its base
        together = run_graph(session, batch, names if any(names) else None)
        return [_of_row(together, batch, row) for row in range(len(rows))]
    return [run_graph(session, row, name) for row, name in zip(rows, names, strict=True)]


def _of_row(outputs: Arrays, batch: Arrays, row: int) -> Arrays:
    """Returns the outputs of one row, without its padding."""
    own = {}
    for key, array in outputs.items():
        if not key.startswith(PRESENT):
            real = real_positions(key, array, batch)
            own[key] = array[row : row + 1] if real is None else array[row : row + 1][:, real[row]]
    return own


def _error(found: Tensors, expected: Tensors, tail: bool, dtype: str) -> float:
    """Returns the largest difference; with ``tail``, compares only the last positions that both have."""
    errors = [0.0]
    for key in found.keys() & expected.keys():
        one = found[key][..., : expected[key].shape[-1]]
        other = expected[key]
        if tail and one.ndim == 3:
            count = min(one.shape[1], other.shape[1])
            one, other = one[:, -count:], other[:, -count:]
        errors.append(largest_difference(one, other, dtype) if one.shape == other.shape else float("inf"))
    return float(np.max(errors))  # NaN stays NaN


def _describe(config: Config, length: int, lengths: Sequence[int]) -> str:
    """Describes a row's length and the last threshold that it or its next token exceeds."""
    passed = [
        threshold
        for threshold in thresholds_of(config).known
        if threshold.length <= length and not threshold.ends
    ]
    why = f", beyond {passed[-1].field} {passed[-1].length}," if passed else ""
    return f"a row of {length} tokens{why} among rows of {', '.join(str(other) for other in lengths)}"


def report_of(source: ExportSource, plan: LongRows, proved: Mapping[str, Any]) -> Json:
    """Returns the parity report's entry on lengths: the rows that were ``proved``, those proved on few
    layers, and those left out.
    """
    unjudged = thresholds_of(config_of(source.folder).to_dict()).unjudged
    few = {"few_layers": {"layers": plan.kept, "rows": list(plan.few)}} if plan.few else {}
    left = {"left_out": dict(plan.left_out)} if plan.left_out else {}
    return {"rows": [], **proved, **few, **left, **({"unjudged": list(unjudged)} if unjudged else {})}
