"""Compares the exported session with torch, base and every adapter, on a ragged padded batch; a graph that
differs is not published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...base.thresholds import SHORT, LongRows
from ...bundle.manifest import PRESENT, Bundle
from ...engine_graph.compare import require_close
from ...errors import ConfigError, ParityError
from ...runtime import canary
from ...runtime.sessions.session import Session
from ...slots.precision import NONE_BELOW, precision
from ...tasks.session import Arrays
from ..frontends.base import ExportSource
from ..tracing.example_inputs import LENGTHS, config_of, example
from .long_rows import prove_long_rows, report_of
from .parity_runs import BARE, ModelOutputs, real_positions, row_of, run_graph, run_torch
from .reference import reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Errors(NamedTuple):
    """How a graph compares with torch: the largest error, the largest size, and the share of real positions
    with the same argmax.
    """

    error: float
    scale: float
    agreement: float

    @property
    def relative(self) -> float:
        """The error as a share of the size, or as it is where that is below one."""
        return self.error / max(1.0, self.scale)


def prove_bundle(
    bundle: Bundle, folder: Path, source: ExportSource, paddings: Sequence[str], plan: LongRows
) -> Bundle:
    """The bundle in ``folder`` with its proof, on the first of these sides of padding on which its graph is
    right; ``plan`` are rows of the proof beside the short ones.

    Raises:
        ParityError: it is right on none, or does not take what the task gives.
    """
    model = reference(source.task, source.folder)
    try:
        return _on_some_side(bundle, folder, source, paddings, plan, model.model)
    except (ParityError, RuntimeError):
        if not model.light:
            raise
    # a model that looks at its weights itself may want them in float32
    whole = reference(source.task, source.folder, whole=True)
    return _on_some_side(bundle, folder, source, paddings, plan, whole.model)


def _on_some_side(
    bundle: Bundle,
    folder: Path,
    source: ExportSource,
    paddings: Sequence[str],
    plan: LongRows,
    model: PreTrainedModel,
) -> Bundle:
    for padding in paddings:
        bundle = dataclasses.replace(bundle, padding=padding)
        bundle.write(folder, draft=True)
        try:
            return dataclasses.replace(bundle, parity=prove(folder, source, model, plan))
        except ParityError:
            if padding == paddings[-1]:
                raise
        # a graph that does not take what the task gives is as wrong as one that computes something else
        except ConfigError as error:
            raise ParityError(f"the graph cannot run the task: {error.sentence}") from error
    raise AssertionError("a graph has a side of padding")


def prove(
    folder: Path, source: ExportSource, model: PreTrainedModel, plan: LongRows = SHORT
) -> dict[str, Any]:
    """What the parity report says of the bundle in ``folder`` against the source's ``model`` in torch: for
    the base and each adapter the largest error, absolute and relative, and the agreement of argmax.

    Models that generate also take one step on their cache. The rows of ``plan`` are on both sides of the
    lengths at which the configuration changes the computation. ``mixed`` is the largest difference between
    rows that each use another adapter and the same rows of a batch with one; ``alone`` that between rows of a
    batch and the same rows by themselves, without padding. The canaries that the packs bring are replayed as
    well, on the graph alone: they know the base and the adapter from when the pack was made, which the torch
    model of this machine does not.

    Raises:
        ParityError: a difference is over the tolerance, or a canary fails.
        BaseMismatch: by its canary, a pack was made for another base.
        NothingToDo: by its canary, an adapter has no effect.
    """
    session, task = Session(folder, provider="cpu", mapped=True, verify="off"), source.task
    tolerance, left = (
        precision(session.bundle.dtype).tolerance,
        task.pads_left and session.bundle.padding == "left",
    )
    rules = [rule for rule in {pack.acts for pack in source.packs} if rule is not None]
    batch = example(task, config_of(source.folder), acts=rules, bare=BARE, left=left, model=lambda: model)
    errors: dict[str, Errors] = {}
    outputs: dict[str | None, Arrays] = {}
    inner = {key for graph in session.graphs.values() for key in graph.inputs}
    for name, expected in run_torch(task, model, batch, source.packs):
        answer = run_graph(session, batch, name)
        outputs[name] = {
            key: array
            for key, array in answer.by_name.items()
            if key not in inner and not key.startswith(PRESENT)
        }
        error = errors[name or _base_name(session)] = _compare(answer, expected, batch, folder)
        require_close(
            f"the graph disagrees with torch for {name or 'the base'}",
            error.error,
            error.scale,
            tolerance,
            folder.name,
        )
    scale = max(error.scale for error in errors.values())
    mixed = _mix_rows(session, batch, outputs)
    alone = _alone(session, batch, outputs)
    for difference, when in (
        (mixed or 0.0, "rows of one batch use different adapters"),
        (alone, "a row runs alone"),
    ):
        require_close(
            f"the graph disagrees with itself when {when}", difference, scale, tolerance, folder.name
        )
    long = prove_long_rows(session, source, model, plan.whole, tolerance, left) if plan.whole else {}
    return {
        "tolerance": tolerance,
        "batch": list(LENGTHS),
        "max_abs": {name: error.error for name, error in errors.items()},
        "max_relative": {name: error.relative for name, error in errors.items()},
        "argmax_agreement": {name: error.agreement for name, error in errors.items()},
        "mixed": mixed,
        "alone": alone,
        "long_rows": report_of(source, plan, long),
        "canary": canary.verify(session),
    }


def _base_name(session: Session) -> str:
    """The name of what rows without an adapter run: the base, or the packs that were folded into it."""
    return "+".join(session.packs) if session.bundle.mode == "folded" and session.packs else "base"


def _compare(graph: ModelOutputs, torch: ModelOutputs, batch: Arrays, folder: Path) -> Errors:
    """The first pass, and the next one of a model that generates."""
    pairs = [(key, graph.by_name[key], torch.by_name[key]) for key in graph.by_name if key in torch.by_name]
    if not pairs:
        raise ParityError(
            "the graph has none of the model's outputs",
            where=folder.name,
            expected=", ".join(torch.by_name),
            found=", ".join(graph.by_name),
        )
    errors = [
        _difference(output, expected, real_positions(key, output, batch)) for key, output, expected in pairs
    ]
    if graph.step is not None and torch.step is not None:
        errors.append(_difference(graph.step, torch.step, np.ones(graph.step.shape[:2], bool)))
    return _worst(errors)


def _worst(errors: Sequence[Errors]) -> Errors:
    """The largest errors and the smallest agreement; NaN stays NaN, which ``max`` would lose."""
    error, scale, _ = np.max(errors, axis=0)
    return Errors(float(error), float(scale), min(error.agreement for error in errors))


def _difference(output: np.ndarray, reference: np.ndarray, real: np.ndarray | None) -> Errors:
    """The errors at positions that are no padding; infinite for another shape, or for an extra label that is
    not switched off.
    """
    wide = reference.shape[-1]
    if (
        output.shape[:-1] != reference.shape[:-1]
        or output.shape[-1] < wide
        or (output[..., wide:] > NONE_BELOW).any()
    ):
        return Errors(float("inf"), 0.0, 0.0)
    output = output[..., :wide]
    # one number a position: the best of each row is one choice
    if real is not None and real.ndim == output.ndim:
        agreement = float(
            np.mean(
                [
                    a[row].argmax() == b[row].argmax()
                    for a, b, row in zip(output, reference, real, strict=True)
                ]
            )
        )
        return Errors(
            float(np.abs(output - reference)[real].max()), float(np.abs(reference[real]).max()), agreement
        )
    if real is not None:
        output, reference = output[real], reference[real]
    agreement = float((output.argmax(-1) == reference.argmax(-1)).mean())
    return Errors(float(np.abs(output - reference).max()), float(np.abs(reference).max()), agreement)


def _mix_rows(session: Session, batch: Arrays, single: dict[str | None, Arrays]) -> float | None:
    """Rows that each use another adapter, against the same rows of the single runs; None where rows cannot
    choose.
    """
    if session.bundle.mode == "folded" or len(single) < 2:
        return None
    names: list[str | None] = [*single]
    count = len(LENGTHS)
    errors = []
    for start in range(0, len(names), count):  # every adapter takes part, even where there are more than rows
        chosen = [names[(start + row) % len(names)] for row in range(count)]
        mixed = session.run(batch, chosen)
        for row, name in enumerate(chosen):
            for key, together in single[name].items():
                real = real_positions(key, together, batch)
                apart = mixed[key][row][..., : together.shape[-1]]
                errors.append(np.abs(apart - together[row])[slice(None) if real is None else real[row]].max())
    return float(np.max(errors))


def _alone(session: Session, batch: Arrays, single: dict[str | None, Arrays]) -> float:
    """Rows by themselves, without padding, against the same rows of the batch; every row and every adapter
    takes part.
    """
    names: list[str | None] = [*single]
    errors = []
    for number in range(max(len(names), len(LENGTHS))):
        row, name = number % len(LENGTHS), names[number % len(names)]
        alone = session.run(row_of(batch, row), name)
        for key, together in single[name].items():
            real = real_positions(key, together, batch)
            expected = together[row] if real is None else together[row][real[row]]
            if alone[key][0].shape != expected.shape:
                return float("inf")
            errors.append(np.abs(alone[key][0] - expected).max())
    return float(np.max(errors))
