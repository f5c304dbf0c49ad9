"""Builds the bundle of an export: tries the frontends in turn until one builds a graph that agrees with the
model in torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

from ..base import ENDS, Checkpoint, require_plain
from ..bundle import Bundle, bundle_in, read_bundle
from ..errors import (
    AdapterpackError,
    BaseMismatch,
    ConfigError,
    FormatError,
    NothingToDo,
    OutputExists,
    ParityError,
    SiteNotFound,
    StorageError,
    Unsupported,
)
from ..extras import needed_by
from ..io import Say, output_folder, scratch_folder
from ..library_errors import root_reason
from ..manifest.manifest import Base
from ..merging.pipeline import merge
from ..quantizing.graphs import StoredWeights, quantize_in_place, quantizes_directly
from ..torch_adapters import empty_model
from .arguments import ExportJob
from .bundle_writer import write_bundle
from .estimate import estimate
from .frontends import FRONTENDS, BaseGraph, ExportSource, Frontend
from .proof.few_layers import cut_packs, stack_of, write_few_layers
from .proof.plan import ProofPlan, plan_proof, sample
from .quantize_base import quantize_base
from .targets import TARGETS
from .tracing.example_inputs import config_of
from .tracing.scratch_checkpoint import write_floats

_LONGEST = 500
"""The most characters of a builder's warning that are recorded."""


def build_bundle(job: ExportJob) -> Bundle:
    """Builds the bundle of a checked export in its folder.

    Raises:
        ParityError: no frontend built a graph that agrees with the model.
        SiteNotFound, Unsupported: no graph has what a pack changes.
    """
    say = job.request.progress or (lambda text: None)
    failed = {}
    with _open_source(job, say) as (opened, source):
        candidates = _candidates(job.request.frontend, source)
        if source.file is None:
            # the configuration has to fit the checkpoint before a frontend allocates the sizes that it states
            empty_model(source.folder, source.task)
        plan = plan_proof(source, job.request.proof, quantizes_directly(opened.quantize))
        say(plan.describe(opened.attached))
        estimated = estimate(opened, source, plan)
        say(estimated.describe())
        estimated.require_room(Path(job.request.out))
        for field, why in plan.rows.left_out.items():
            # nearly every proof stops short of the longest context, so that is not worth a message
            if field.rpartition(".")[2] not in ENDS:
                say(f"no row of the proof reaches past {field}: {why}")
        for candidate in candidates:
            say(f"build the graph with {candidate.name}")
            try:
                taken = candidate.takes(source)
                small = _prove_few_layers(candidate, opened, taken, plan, say)
                graph = _build(candidate, taken)
                for warning in graph.warnings:
                    say(f"{candidate.name} warns: {warning}")
                with output_folder(job.request.out) as folder:
                    write_bundle(folder, opened, taken, graph, plan, say, small)
                return read_bundle(bundle_in(job.request.out))
            except _WHATEVER_THE_GRAPH:
                raise
            except Exception as error:  # another frontend's graph may agree, or have the missing site
                if source.file is not None:
                    raise
                # If the base changed meanwhile, every frontend would fail, each after a long build.
                job.base.require_unchanged()
                failed[candidate.name] = error
                say(f"the frontend {candidate.name} made no graph that fits: {_sentence(error)}")
    raise _explain(failed, job.base.folder)


_WHATEVER_THE_GRAPH = (BaseMismatch, ConfigError, NothingToDo, OutputExists, StorageError)
"""Errors that would occur with any frontend."""


def _sentence(error: Exception) -> str:
    return (
        error.sentence
        if isinstance(error, AdapterpackError)
        else f"{type(error).__name__}: {root_reason(error)}"
    )


def _explain(failed: Mapping[str, Exception], base: Path) -> Exception:
    """Combines the errors of all frontends into one: the last error about a missing site, or the error that
    no graph agrees with the model.
    """
    refused = [name for name, error in failed.items() if isinstance(error, SiteNotFound | Unsupported)]
    bugs = [name for name, error in failed.items() if not isinstance(error, AdapterpackError)]
    if shown := (refused or (bugs if len(bugs) == len(failed) else []))[-1:]:
        for name in failed.keys() - shown:
            failed[shown[0]].add_note(f"The frontend {name} was tried before: {_sentence(failed[name])}")
        return failed[shown[0]]
    reasons = "; ".join(f"{name}: {_sentence(error)}" for name, error in failed.items())
    return ParityError(
        "no frontend made a graph that agrees with the model",
        where=base,
        found=reasons,
        remedy="report this architecture, or try another --frontend",
    )


@contextlib.contextmanager
def _open_source(job: ExportJob, say: Say) -> Iterator[tuple[ExportJob, ExportSource]]:
    """Yields the source of the graph: the checkpoint, or a temporary one of floats with the folded packs
    merged in, likewise for the ONNX file; and the job with the codes that the graph is to store.
    """
    source = ExportSource(job.base.folder, job.task, job.dtype, job.file, job.attached)
    folds = job.request.mode == "folded" and bool(job.packs)
    if not folds and job.decoded is None and job.trained is None:
        yield job, source
        return
    with scratch_folder() as root:
        name = source.folder.resolve().name
        decoded = job.decoded
        packs = job.packs
        new = list[str]()
        if job.trained is not None and job.quantize is not None:
            say(f"quantize the base as {job.trained.scheme}, as in training")
            with needed_by("adapterpack.export", "export"):
                decoded, new = quantize_base(job.trained, job.task, source.folder, root / "quantized")
            job = job._replace(quantize=job.quantize._replace(stored=StoredWeights(decoded)))
        if decoded is not None:
            say("dequantize")
            (root / "plain").mkdir()
            write_floats(decoded, root / "plain" / name, None if job.trained else job.base, new)
            source = source._replace(folder=root / "plain" / name)
            packs = [
                dataclasses.replace(pack, manifest=replace(pack.manifest, base=Base())) for pack in packs
            ]
        if folds:
            say("merge")
            if decoded is None:
                require_plain(job.base)
            merge(
                source.folder,
                packs,
                root / name,
                allow_structural=job.request.allow_structural,
                dtype=None if decoded is None else "float32",
            )
            if source.file is not None:
                report = merge(
                    source.file,
                    packs,
                    root / "graph",
                    checkpoint=source.folder,
                    allow_structural=job.request.allow_structural,
                )
                source = source._replace(file=root / "graph" / report.graph)  # type: ignore[union-attr]
            source = source._replace(folder=root / name)
        yield job, source


def _candidates(name: str | None, source: ExportSource) -> list[Frontend]:
    """Returns the frontends to try, in order: the named one, or all."""
    frontends = [FRONTENDS[name]] if name is not None else FRONTENDS.values()
    candidates = sorted(
        (frontend for frontend in frontends if frontend.supports(source)), key=lambda frontend: frontend.rank
    )
    if not candidates:
        model_type = Checkpoint(source.folder).config.get("model_type")
        raise Unsupported(
            "no frontend exports this task",
            found=f"{model_type}, {source.task.name}",
            expected=", ".join(FRONTENDS),
            remedy="choose another --task or --frontend",
        )
    return candidates


def _prove_few_layers(
    frontend: Frontend, job: ExportJob, source: ExportSource, plan: ProofPlan, say: Say
) -> Bundle | None:
    """Proves a copy of a few layers, built by the same frontend: the rows that would take too long on the
    full model, or in a proof by layers all rows and a sample of the packs. Returns the copy's bundle if there
    is anything to prove on it.

    Raises:
        ParityError: a graph disagrees with torch, or the engine's with the ordinary one.
    """
    by_layers = plan.depth == "layers"
    rows = plan.small_rows
    if not by_layers and not rows.whole:
        return None
    base = Checkpoint(source.folder)
    config = config_of(source.folder).to_dict()
    stack = plan.stack or stack_of(base, config)
    if stack is None:
        raise AssertionError("rows are planned for few layers where there is a stack of them")
    longest = f"rows of up to {max(rows.whole)} tokens on " if rows.whole else ""
    say(f"prove {longest}{stack.kept} of {stack.layers} layers")
    packs = cut_packs(base, stack, sample(source.packs)) if by_layers else []
    with scratch_folder() as root:
        copy = write_few_layers(base, config, stack, root / source.folder.resolve().name)
        small = source._replace(folder=copy, packs=packs)
        alone = job._replace(
            request=dataclasses.replace(
                job.request, mode=job.request.mode if packs else "folded", split=None
            ),
            base=Checkpoint(copy),
            packs=packs,
            quantize=None,
            target=TARGETS["ort"],
        )
        write_bundle(
            root / "bundle",
            alone,
            small,
            _build(frontend, small),
            ProofPlan(rows=rows),
            lambda text: say(f"{stack.kept} layers: {text}"),
        )
        gc.collect()  # graphs are cycles, which hold the weights that they read
        if plan.direct and job.quantize is not None:
            shutil.rmtree(copy)  # room for the codes, which are made of the graph
            say(f"{stack.kept} layers: quantize to {job.quantize.scheme}")
            quantize_in_place(root / "bundle", job.quantize)
        return read_bundle(root / "bundle")


def _build(frontend: Frontend, source: ExportSource) -> BaseGraph:
    """Builds the frontend's graph. Reports any failure as an error on which the caller tries the next
    frontend.
    """
    try:
        with needed_by("adapterpack.export", "export"), _collect_warnings() as warnings:
            graph = frontend.build(source)
        return graph._replace(warnings=(*graph.warnings, *dict.fromkeys(warnings)))
    # there is no other frontend for an ONNX file that the user named
    except (
        FormatError,
        SiteNotFound,
        StorageError,
        Unsupported,
    ):
        raise
    except Exception as error:
        raise ParityError(
            f"this architecture cannot be built: {root_reason(error)}", where=frontend.name
        ) from error


@contextlib.contextmanager
def _collect_warnings() -> Iterator[list[str]]:
    """Collects the warnings that libraries log in the block, and keeps Python from printing them."""
    heard = []

    def hear(record: logging.LogRecord) -> None:
        heard.append(" ".join(record.getMessage().split())[:_LONGEST])

    handler = logging.Handler(logging.WARNING)
    handler.emit = hear  # type: ignore[method-assign]
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield heard
    finally:
        root.removeHandler(handler)
