"""Compares the exported session with torch, for the base and each adapter, on a ragged padded batch; a graph
that differs is not published.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...base import SHORT, Checkpoint, LongRows
from ...bundle import PRESENT, Bundle, SiteMap
from ...engine_graph.compare import require_close
from ...errors import ConfigError, ParityError
from ...io import Json, Say
from ...readable import StepCounter
from ...runtime import Session, canary
from ...slots import NONE_BELOW
from ...slots.precision import precision
from ...tasks import FRAMES, Arrays
from ...torch_adapters import empty_model
from ..frontends.base import ExportSource
from ..tracing.example_inputs import LENGTHS, config_of, example
from .long_rows import prove_long_rows, report_of
from .parity_runs import BARE, STEP, real_positions, row_of, run_graph, run_torch
from .places import require_places
from .plan import ProofPlan, sample
from .reference import reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Errors(NamedTuple):
    """The difference between a graph and torch: the largest error, the largest output, and the share of real
    positions with the same argmax.
    """

    error: float
    scale: float
    agreement: float

    @property
    def relative(self) -> float:
        """The error divided by the largest output, or the error itself if that output is below 1."""
        return self.error / max(1.0, self.scale)


def prove_bundle(
    bundle: Bundle,
    folder: Path,
    source: ExportSource,
    paddings: Sequence[str],
    plan: ProofPlan,
    say: Say,
    sites: SiteMap,
    small: Bundle | None,
) -> Bundle:
    """Proves the bundle in ``folder`` on each of these padding sides in turn, and returns it with the proof
    for the first side on which the graph is right. By layers, ``small`` is the bundle of the few layers,
    and ``sites`` are all linear layers of the graphs.

    Raises:
        ParityError: the graph is right on neither side, or does not take the task's inputs; or a weight of
            the checkpoint is not where it belongs.
    """
    if plan.depth == "none":
        say("the graph is NOT proved")
        return dataclasses.replace(bundle, padding=paddings[0], parity=_nothing(bundle, plan))
    started = time.perf_counter()
    packs = source.packs
    rows = plan.rows
    if plan.depth == "layers" and small is not None:
        source = source._replace(packs=sample(packs))
        paddings = (small.padding,)
        rows = rows._replace(whole=(), few=plan.small_rows.whole, kept=plan.report(packs)["layers"])
    if plan.whole:
        say("load the model in torch and prove parity")
        proved = _against_torch(bundle, folder, source, paddings, rows, say)
        report = plan.report(packs)
    else:
        assert small is not None
        say("look for the weights of the checkpoint in the graph, and compare the graph with itself")
        placed = require_places(folder, sites, Checkpoint(source.folder))
        bundle = dataclasses.replace(bundle, padding=small.padding)
        parity = {key: value for key, value in small.parity.items() if key != "decoder"}
        parity |= _by_itself(bundle, folder, source, say) | {"long_rows": report_of(source, rows, {})}
        proved = dataclasses.replace(bundle, parity=parity)
        report = plan.report(packs, placed)
    say(f"proved; the proof took {time.perf_counter() - started:.1f} s")
    return dataclasses.replace(proved, parity={**proved.parity, "proof": report})


def _nothing(bundle: Bundle, plan: ProofPlan) -> Json:
    """Returns the parity report of a bundle that is not proved."""
    why = {adapter.name: "the export was not proved" for adapter in bundle.adapters}
    return {
        "tolerance": precision(bundle.dtype).tolerance,
        "batch": [],
        **{key: {} for key in ("max_abs", "max_relative", "argmax_agreement")},
        "mixed": None,
        "alone": None,
        "canary": {"replayed": {}, "not_replayed": why},
        "proof": plan.report(()),
    }


def _against_torch(
    bundle: Bundle,
    folder: Path,
    source: ExportSource,
    paddings: Sequence[str],
    rows: LongRows,
    say: Say,
) -> Bundle:
    model = reference(source.task, source.folder)
    try:
        return _on_some_side(bundle, folder, source, paddings, rows, model.model, say)
    except (ParityError, RuntimeError):
        if not model.light:
            raise
    # some models use their weights directly and need them in float32
    whole = reference(source.task, source.folder, whole=True)
    return _on_some_side(bundle, folder, source, paddings, rows, whole.model, say)


def _by_itself(bundle: Bundle, folder: Path, source: ExportSource, say: Say) -> Json:
    """Compares the rows of a batch with the same rows alone, and with another adapter in each row, without
    torch; returns these entries of the parity report.

    Raises:
        ParityError: they differ, or an output is not finite.
    """
    bundle.write(folder, draft=True)
    session = Session(folder, provider="cpu", mapped=True, verify="off")
    task = source.task
    names = [None, *(pack.name for pack in source.packs)]
    steps = StepCounter(len(names) + _itself_steps(session, len(names)), say)
    batch = _batch(session, source, lambda: empty_model(source.folder, task))
    outputs = {}
    for name in names:
        outputs[name] = _outer(session, session.run(batch, name))
        steps.tick()
    numbers = [
        array[... if real is None else real]
        for answer in outputs.values()
        for key, array in answer.items()
        for real in [real_positions(key, array, batch)]
    ]
    if not all(np.isfinite(array).all() for array in numbers):
        raise ParityError("the graph's outputs are not finite", where=folder.name)
    scale = max(float(np.abs(array).max()) for array in numbers)
    return {**_agreement(session, batch, outputs, scale, steps), "canary": canary.verify(session)}


def _on_some_side(
    bundle: Bundle,
    folder: Path,
    source: ExportSource,
    paddings: Sequence[str],
    rows: LongRows,
    model: PreTrainedModel,
    say: Say,
) -> Bundle:
    for padding in paddings:
        bundle = dataclasses.replace(bundle, padding=padding)
        bundle.write(folder, draft=True)
        try:
            return dataclasses.replace(bundle, parity=prove(folder, source, model, rows, say))
        except ParityError:
            if padding == paddings[-1]:
                raise
        # a graph that does not take the task's inputs is as wrong as one that computes something else
        except ConfigError as error:
            raise ParityError(f"the graph cannot run the task: {error.sentence}") from error
    raise AssertionError("a graph has a side of padding")


def prove(
    folder: Path,
    source: ExportSource,
    model: PreTrainedModel,
    plan: LongRows = SHORT,
    say: Say = lambda text: None,
) -> Json:
    """Compares the bundle in ``folder`` with the source's ``model`` in torch and returns the parity report:
    for the base and each adapter the largest absolute and relative error, and the agreement of argmax.

    Models that generate also take one step on their cache. The rows of ``plan`` are on both sides of the
    lengths at which the configuration changes the computation. ``mixed`` is the largest difference between
    rows that each use another adapter and the same rows of a batch with one; ``alone`` that between rows of a
    batch and the same rows by themselves, without padding. It also replays the packs' canaries on the graph
    alone: they record the outputs from when the pack was made, which the torch model on this machine cannot
    show.

    Raises:
        ParityError: a difference is over the tolerance, or a canary fails.
        BaseMismatch: by its canary, a pack was made for another base.
        NothingToDo: by its canary, an adapter has no effect.
    """
    session = Session(folder, provider="cpu", mapped=True, verify="off")
    task = source.task
    tolerance = precision(session.bundle.dtype).tolerance
    batch = _batch(session, source, lambda: model)
    errors = {}
    outputs = {}
    count = 1 + len(source.packs)
    steps = StepCounter(count + _itself_steps(session, count) + bool(plan.whole), say)
    for name, expected in run_torch(task, model, batch, source.packs):
        answer = run_graph(session, batch, name)
        outputs[name] = _outer(session, answer)
        own = {FRAMES: answer[FRAMES]} if FRAMES in answer else {}
        error = errors[name or _base_name(session)] = _compare(answer, expected, batch | own, folder)
        require_close(
            f"the graph disagrees with torch for {name or 'the base'}",
            error.error,
            error.scale,
            tolerance,
            folder.name,
        )
        steps.tick()
    scale = max(error.scale for error in errors.values())
    itself = _agreement(session, batch, outputs, scale, steps)
    other = _other_size(session, batch)
    if other:
        (_, expected), *_ = run_torch(task, model, other, ())
        found = _compare(session.run(other), expected, other, folder)
        why = f"the graph disagrees with torch for images of {other['pixel_values'].shape[2:]}"
        require_close(why, found.error, found.scale, tolerance, folder.name)
    long = (
        prove_long_rows(session, source, model, plan.whole, tolerance, session.pads_left)
        if plan.whole
        else {}
    )
    return {
        "tolerance": tolerance,
        "batch": list(LENGTHS),
        "max_abs": {name: error.error for name, error in errors.items()},
        "max_relative": {name: error.relative for name, error in errors.items()},
        "argmax_agreement": {name: error.agreement for name, error in errors.items()},
        **itself,
        "long_rows": report_of(source, plan, long),
        "canary": canary.verify(session),
    }


def _batch(session: Session, source: ExportSource, model: Callable[[], Any]) -> Arrays:
    """Returns the ragged batch of a proof."""
    rules = [rule for rule in {pack.acts for pack in source.packs} if rule is not None]
    return example(
        source.task, config_of(source.folder), acts=rules, bare=BARE, left=session.pads_left, model=model
    )


def _outer(session: Session, answer: Arrays) -> Arrays:
    """Returns the outputs that a caller sees: without caches, and what one graph gives to the next."""
    inner = {STEP, *(key for graph in map(session.graph, session.bundle.parts) for key in graph.inputs)}
    return {key: array for key, array in answer.items() if key not in inner and not key.startswith(PRESENT)}


def _itself_steps(session: Session, count: int) -> int:
    """Returns the number of runs by which :func:`_agreement` compares ``count`` adapters."""
    rows = len(LENGTHS)
    return max(count, rows) + (0 if session.bundle.mode == "folded" or count < 2 else -(-count // rows))


def _agreement(
    session: Session, batch: Arrays, outputs: dict[str | None, Arrays], scale: float, steps: StepCounter
) -> Json:
    """Returns the differences of a graph from itself: ``mixed`` adapters in a batch, and rows ``alone``.

    Raises:
        ParityError: one is over the tolerance.
    """
    tolerance = precision(session.bundle.dtype).tolerance
    name = session.folder.name
    mixed = _mix_rows(session, batch, outputs, steps)
    itself = "the graph disagrees with itself when "
    require_close(f"{itself}rows of one batch use different adapters", mixed or 0.0, scale, tolerance, name)
    alone = _alone(session, batch, outputs, steps)
    require_close(f"{itself}a row runs alone", alone, scale, tolerance, name)
    return {"mixed": mixed, "alone": alone}


def _base_name(session: Session) -> str:
    """Returns the name for rows without an adapter: the base, or the packs that were folded into it."""
    return "+".join(session.packs) if session.bundle.mode == "folded" and session.packs else "base"


def _compare(graph: Arrays, torch: Arrays, batch: Arrays, folder: Path) -> Errors:
    """Compares the first pass, and the next step of a model that generates."""
    common = [key for key in graph if key in torch]
    if not common:
        raise ParityError(
            "the graph has none of the model's outputs",
            where=folder.name,
            expected=", ".join(torch),
            found=", ".join(graph),
        )
    return _worst(
        [_difference(graph[key], torch[key], real_positions(key, graph[key], batch)) for key in common]
    )


def _worst(errors: Sequence[Errors]) -> Errors:
    """Returns the largest errors and the smallest agreement; keeps NaN, which ``max`` would lose."""
    error, scale, _ = np.max(errors, axis=0)
    return Errors(float(error), float(scale), min(error.agreement for error in errors))


def _difference(output: np.ndarray, reference: np.ndarray, real: np.ndarray | None) -> Errors:
    """Returns the errors at positions without padding; infinite if shapes differ or an extra label is not
    masked out.
    """
    wide = reference.shape[-1]
    if (
        output.shape[:-1] != reference.shape[:-1]
        or output.shape[-1] < wide
        or (output[..., wide:] > NONE_BELOW).any()
    ):
        return Errors(float("inf"), 0.0, 0.0)
    output = output[..., :wide]
    chosen = ... if real is None else real
    error = np.abs(output - reference)[chosen].max()
    scale = np.abs(reference[chosen]).max()
    # with one number for each position, argmax picks one position of a row
    if real is not None and real.ndim == output.ndim:
        rows = zip(output, reference, real, strict=True)
        same: Any = [one[row].argmax() == other[row].argmax() for one, other, row in rows]
    else:
        same = output[chosen].argmax(-1) == reference[chosen].argmax(-1)
    return Errors(float(error), float(scale), float(np.mean(same)))


def _mix_rows(
    session: Session, batch: Arrays, single: dict[str | None, Arrays], steps: StepCounter
) -> float | None:
    """Compares a batch in which each row uses another adapter with the runs of single adapters; None where
    rows cannot choose.
    """
    if session.bundle.mode == "folded" or len(single) < 2:
        return None
    names = [*single]
    count = len(LENGTHS)
    errors = []
    # covers every adapter, even if there are more adapters than rows
    for start in range(0, len(names), count):
        chosen = [names[(start + row) % len(names)] for row in range(count)]
        mixed = session.run(batch, chosen)
        steps.tick()
        for row, name in enumerate(chosen):
            for key, together in single[name].items():
                real = real_positions(key, together, batch | single[name])
                apart = mixed[key][row][..., : together.shape[-1]]
                errors.append(np.abs(apart - together[row])[slice(None) if real is None else real[row]].max())
    return float(np.max(errors))


def _other_size(session: Session, batch: Arrays) -> Arrays:
    """Returns a batch with images of another height and width, if the graph takes any; each is a multiple of
    one of the first.
    """
    if "height" not in session.task.main.axes.get("pixel_values", ()):
        return {}
    if any(isinstance(extent, int) for extent in session.shape("pixel_values")[1:]):
        return {}
    turned = batch["pixel_values"].swapaxes(2, 3)
    return {**batch, "pixel_values": np.ascontiguousarray(np.concatenate([turned, turned[..., ::-1]], 3))}


def _alone(session: Session, batch: Arrays, single: dict[str | None, Arrays], steps: StepCounter) -> float:
    """Compares rows that run by themselves, without padding, with the same rows of the batch; covers every
    row and every adapter.
    """
    names = [*single]
    image_token = session.image_token if "image_features" in session.task.main.inputs else None
    errors = []
    for number in range(max(len(names), len(LENGTHS))):
        row = number % len(LENGTHS)
        name = names[number % len(names)]
        alone = session.run(row_of(batch, row, image_token), name)
        steps.tick()
        for key, together in single[name].items():
            real = real_positions(key, together, batch | single[name])
            expected = together[row] if real is None else together[row][real[row]]
            if alone[key][0].shape != expected.shape:
                return float("inf")
            errors.append(np.abs(alone[key][0] - expected).max())
    return float(np.max(errors))
