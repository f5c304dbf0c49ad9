"""Merges adapters into an ONNX file or a bundle: copies the files and changes some initializers in the
copies.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...base import carried_files, require_plain
from ...bundle import GENAI_FILE, GRAPH, Bundle, BundledAdapter, read_bundle
from ...errors import ConfigError, NothingToDo, ParityError, Unsupported
from ...io import (
    Progress,
    Span,
    Ticker,
    copy_file,
    copy_folder,
    copy_span,
    identity,
    one_thread_each,
    open_descriptor,
    output_folder,
    refuse_existing,
    require_unchanged,
    scratch_folder,
    strict_json,
)
from ...onnx_graph import GraphFile, TensorPlace, WeightPiece, match_bias, problems, require_place
from ...onnx_graph.match import match
from ...pack import Pack, as_pack, weights_of
from ...paths import StrPath
from ..checkpoint import MergeBase, MergedPack, plan, provenance, require_outside
from .fold import Folded, fold, put
from .graph_base import GraphBase
from .report import GraphReport, GraphTensor
from .strip_adapters import strip_adapters
from .write import GraphWriter, opened_all

CARRIED = (GENAI_FILE,)
_CHUNK = 4 << 20


def merge_graph(
    source: StrPath,
    packs: Sequence[Pack | StrPath],
    out: StrPath,
    *,
    checkpoint: StrPath | None = None,
    weights: Sequence[float] | None = None,
    safe: bool = False,
    allow_structural: bool = False,
    progress: Progress | None = None,
) -> GraphReport:
    """Folds ``packs`` into the graph ``source`` and writes it, with its data and what belongs to it, to the
    new folder ``out``.

    ``source`` is an ``.onnx`` file that any tool made from ``checkpoint``, whose tensors are found in it by
    their content; or the folder of a bundle, whose site map says where they are. Each fold is computed from
    the checkpoint's own numbers where there is one, and rounded once to what the initializer stores; a
    quantized weight is rounded to its own bits and blocks. Files are copied and changed in place, weight by
    weight. The result is checked by ONNX and opened by ONNX Runtime before it gets its name.

    A bundle becomes a folded one: its slots and the adapters in them are left out.

    Raises:
        OutputExists, ConfigError: the output path or an argument cannot be used.
        BaseMismatch, SiteNotFound: a pack was made for another base, or the graph lacks what the pack
            changes.
        FormatError: the graph is malformed, or its external data lies outside its folder.
        Unsupported: the fold would not be exact, or would change more than the pack's sites.
        NothingToDo: no weight would change, or none did after rounding.
        ParityError: the folded graph cannot be used.

    Example:
        >>> merge_graph("model.onnx", ["packs/tickets"], "tickets-onnx",
        ...     checkpoint="MiniLM")  # doctest: +SKIP
    """
    started = time.perf_counter()
    target = Path(out)
    refuse_existing(target)
    opened_packs = [as_pack(pack) for pack in packs]
    factors = weights_of(opened_packs, weights, 1.0)
    with _open(Path(source), checkpoint, opened_packs) as origin:
        graph = origin.graph
        base = origin.base
        bundle = origin.bundle
        inputs = [pack.path for pack in opened_packs if pack.path is not None]
        require_outside(target, [origin.folder, *inputs] if bundle else inputs)
        todo = plan.make(base, opened_packs, factors, allow_structural)
        work = _locate(origin, todo)
        before = {path: identity(path) for path in graph.files}
        with output_folder(target) as folder:
            files = {path: folder / path.relative_to(graph.folder) for path in graph.files}
            numbers = sum(math.prod(base.tensors[one.weight].shape) for one, _ in work.targets)
            tick = Ticker(sum(path.stat().st_size for path in files) + numbers, progress).add
            for path, copy in files.items():
                _copy(path, copy, tick)
            with one_thread_each(), opened_all(files) as sinks:
                writer = GraphWriter(graph, sinks)
                done = [fold(one, base, places, writer, safe, tick) for one, places in work.targets]
                for value, place in work.replaced:
                    put(value, place, writer, safe)
            if done and not work.replaced and not any(folded.loss.stored for folded in done):
                raise NothingToDo(
                    "the whole change was lost in rounding: the output would equal the base",
                    where=target,
                    found=done[0].loss.dtype,
                    remedy="fold into a graph of a wider dtype, or keep the adapter unmerged",
                )
            for path, one in before.items():
                require_unchanged(path, one)
            base.require_unchanged()
            checks = _check(files[graph.path], graph.path, graph.files)
            report = GraphReport(
                out=str(target),
                graph=graph.path.name,
                base_name=base.name,
                base_structure=base.structure,
                base_content=base.content if bundle is None else bundle.base.content,
                packs=tuple(
                    MergedPack(pack.name, pack.id, factor, verdict.name)
                    for pack, factor, verdict in zip(opened_packs, factors, todo.verdicts, strict=True)
                ),
                tensors=tuple(
                    _tensor_report(folded, places)
                    for folded, (_, places) in zip(done, work.targets, strict=True)
                ),
                replaced=tuple(sorted(place.tensor for _, place in work.replaced)),
                initializers=len(graph.model.graph.initializer),
                bytes_written=sum(copy.stat().st_size for copy in files.values()),
                seconds=0.0,
                checks=checks,
                left_out=origin.left_out,
            )
            for path in carried_files(origin.folder, CARRIED):
                if not (folder / path.name).exists():
                    copy_file(path, folder / path.name)
            (folder / provenance.FILE_NAME).write_bytes(strict_json.canonical(report.provenance()))
            if bundle is not None:
                _write_bundle(bundle, origin.folder, folder, opened_packs, report)
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


class _Origin(NamedTuple):
    """The target of a merge: the graph, the base whose weights it holds, and the bundle, if it is one."""

    folder: Path
    graph: GraphFile
    base: MergeBase
    bundle: Bundle | None
    left_out: tuple[str, ...]


@contextmanager
def _open(source: Path, checkpoint: StrPath | None, packs: Sequence[Pack]) -> Iterator[_Origin]:
    if source.suffix == ".onnx":
        if checkpoint is None:
            raise ConfigError(
                "a graph alone does not say which of its weights are which",
                where=source,
                expected="--base CHECKPOINT",
                remedy="name the checkpoint that it was exported from",
            )
        yield _Origin(source.parent, GraphFile(source), _open_checkpoint(checkpoint), None, ())
        return
    bundle = read_bundle(source)
    if len(bundle.parts) > 1:
        raise Unsupported(
            "a fold goes into one graph, and this bundle has several",
            where=source,
            found=", ".join(bundle.parts),
            remedy="merge the checkpoint, or export it with --mode folded",
        )
    twice = (
        sorted({adapter.name for adapter in bundle.adapters} & {pack.name for pack in packs})
        if bundle.mode == "folded"
        else []
    )
    if twice:
        raise ConfigError(
            "an adapter of that name is folded into the bundle already",
            where=source,
            found=", ".join(twice),
            remedy="rename one: NAME=PATH",
        )
    with scratch_folder() as scratch:
        path = source / GRAPH
        left_out = tuple[str, ...]()
        if bundle.mode != "folded":
            path = scratch / GRAPH
            strip_adapters(source, bundle, path)
            left_out = tuple(adapter.name for adapter in bundle.adapters)
            bundle = dataclasses.replace(bundle, adapters=())
        graph = GraphFile(path)
        base = GraphBase(source, bundle, graph, packs) if checkpoint is None else _open_checkpoint(checkpoint)
        yield _Origin(source, graph, base, bundle, left_out)


def _open_checkpoint(checkpoint: StrPath) -> MergeBase:
    """Opens a checkpoint, which must not be quantized, since its tensors are searched in the graph by their
    bytes.
    """
    base = MergeBase(checkpoint)
    require_plain(base)
    return base


class _LocatedPlan(NamedTuple):
    """Every target with the places of its weight and its bias, and every fully trained module with its
    place.
    """

    targets: list[tuple[plan.MergeTarget, tuple[TensorPlace, TensorPlace | None]]]
    replaced: list[tuple[np.ndarray, TensorPlace]]


def _locate(origin: _Origin, todo: plan.MergePlan) -> _LocatedPlan:
    if todo.full_modules.added:
        raise Unsupported(
            "a pack brings modules that the base lacks, and a fold adds no nodes to a graph",
            where=origin.graph.path,
            found=", ".join(sorted(todo.full_modules.added)[:5]),
            remedy="export BASE PACK --mode folded",
        )
    for name, value in todo.full_modules.replaced.items():
        if value.shape != origin.base.tensors[name].shape:
            raise Unsupported(
                "a module that was trained whole has another shape in the graph",
                where=f"{origin.graph.path}, {name}",
                expected=origin.base.tensors[name].shape,
                found=value.shape,
                remedy="export BASE PACK --mode folded",
            )
    wide = {name: value for name, value in todo.full_modules.replaced.items() if value.ndim > 1}
    kinds = {**{name: target.kind for name, target in todo.targets.items()}, **dict.fromkeys(wide, "linear")}
    base = origin.base
    if not isinstance(base, GraphBase) and (apart := sorted(kinds.keys() & base.stacks.keys())):
        raise Unsupported(
            "the checkpoint stores these experts one by one, and a graph holds them otherwise",
            where=origin.graph.path,
            found=", ".join(apart[:5]),
            remedy="fold into the checkpoint, and export that with --mode folded",
        )
    places = base.places(kinds) if isinstance(base, GraphBase) else match(origin.graph, base, kinds)

    def bias_of(name: str, weight: TensorPlace | None) -> TensorPlace:
        if isinstance(base, GraphBase):
            return base.places({name: "norm"})[name]
        return match_bias(origin.graph, base, name, weight)

    targets = [
        (target, (places[name], None if target.bias is None else bias_of(target.bias, places[name])))
        for name, target in todo.targets.items()
    ]
    replaced = [
        (
            value,
            places[name]
            if name in wide
            else bias_of(name, places.get(f"{name.removesuffix('.bias')}.weight")),
        )
        for name, value in todo.full_modules.replaced.items()
    ]
    changed = [place for _, pair in targets for place in pair if place is not None]
    _require_disjoint(origin.graph, changed + [place for _, place in replaced])
    return _LocatedPlan(targets, replaced)


def _require_disjoint(graph: GraphFile, places: Sequence[TensorPlace]) -> None:
    """Checks that no number belongs to two changed tensors, or to another initializer as well."""
    pieces_of: dict[str, list[tuple[WeightPiece, str]]] = {}
    changed = set()
    for place in places:
        for piece in place.all_pieces:
            for name in _changed_initializers(piece):
                changed.add(require_place(graph, name).name)
            for other, tensor in pieces_of.get(piece.initializer, ()):
                if tensor != place.tensor and _overlap(piece, other):
                    raise Unsupported(
                        "one initializer is two tensors of the base at once, so neither can be changed alone",
                        where=f"{graph.path}, {piece.initializer}",
                        found=f"{tensor} and {place.tensor}",
                        remedy="fold into the checkpoint, and export again",
                    )
            pieces_of.setdefault(piece.initializer, []).append((piece, place.tensor))
    spans = sorted(
        (one.file, one.offset, one.offset + one.nbytes, one.name)
        for one in graph.stored.values()
        if one.nbytes
    )
    for (file, _, stop, name), (file_after, start, _, after) in pairwise(spans):
        if file == file_after and start < stop and {name, after} & changed:
            raise Unsupported(
                "two initializers share bytes of one file, so neither can be changed alone",
                where=graph.path,
                found=f"{name} and {after}",
                remedy="save the model again with data of its own for each initializer",
            )


def _overlap(one: WeightPiece, other: WeightPiece) -> bool:
    """Whether two pieces of an initializer, along its rows or its columns, have a number in common."""
    if None not in (one.slot, other.slot) and one.slot != other.slot:
        return False
    same_way = (one.axis != int(one.transposed)) == (other.axis != int(other.transposed))
    return not same_way or (
        one.at < other.at + other.stop - other.start and other.at < one.at + one.stop - one.start
    )


def _changed_initializers(piece: WeightPiece) -> list[str]:
    one = piece.nbits
    return [piece.initializer] if one is None else list(filter(None, (one.weight, one.scales, one.zeros)))


def _tensor_report(folded: Folded, places: tuple[TensorPlace, TensorPlace | None]) -> GraphTensor:
    present = [place for place in places if place is not None]
    return GraphTensor(
        folded.loss,
        tuple(name for place in present for name in place.initializers),
        tuple(piece.layout for piece in places[0].all_pieces),
        tuple(dict.fromkeys(node for place in present for node in place.nodes)),
        folded.quantized,
    )


def _copy(source: Path, target: Path, tick: Callable[[int], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        open_descriptor(source, os.O_RDONLY) as reader,
        open_descriptor(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as sink,
    ):
        size = source.stat().st_size
        for start in range(0, size, _CHUNK):
            nbytes = min(_CHUNK, size - start)
            copy_span(reader, sink, Span(start, start, nbytes), lambda count: np.empty(count, np.uint8))
            tick(nbytes)


def _write_bundle(
    source: Bundle, origin: Path, folder: Path, packs: Sequence[Pack], report: GraphReport
) -> None:
    """Writes the manifest of a folded bundle with its packs and those of the ``source``, which lies at
    ``origin``, and the engine's graph if the source has one; replays the packs' canaries where possible.
    """
    import onnx_ir as ir  # noqa: PLC0415 - only a bundle needs it

    from ...bundle import signature_of  # noqa: PLC0415
    from ...engine_graph.parity import rederive  # noqa: PLC0415 - only a bundle is run
    from ...runtime.sessions.canary_process import replay_apart  # noqa: PLC0415 - only a bundle is run

    for adapter in source.adapters:
        copy_folder(origin / adapter.path, folder / adapter.path, origin)
    for pack in packs:
        (folder / "adapters" / pack.name).mkdir(parents=True)
        pack.write_into(folder / "adapters" / pack.name)
    added = [
        BundledAdapter(pack.name, pack.id, f"adapters/{pack.name}", None, pack.manifest.task.labels)
        for pack in packs
    ]
    sites = {
        path: dataclasses.replace(site, fields=(), labels=0, role="adapter", ranks={}, positional=False)
        for path, site in source.sites.items()
        if site.weight
    }
    labels, problem = next(
        (
            (pack.manifest.task.labels, pack.manifest.problem)
            for pack in packs
            if pack.full() and pack.manifest.task.labels
        ),
        (source.base_labels, source.base_problem),
    )
    bundle = dataclasses.replace(
        source,
        mode="folded",
        sites=sites,
        adapters=(*source.adapters, *added),
        slots=0,
        max_rank=0,
        max_labels=0,
        base_labels=labels,
        base_problem=problem,
        parity={"folded": dict(report.checks)},
        io=signature_of(ir.load(folder / GRAPH)),
        target="ort",
        in_place=False,
        decoder=False,
    )
    if source.decoder:
        bundle = rederive(bundle, folder, source)
    bundle.write(folder)
    if all(pack.weight == 1 for pack in report.packs):
        parity = {**bundle.parity, "canary": replay_apart(folder, verify="off")}
        dataclasses.replace(bundle, parity=parity).write(folder)


def _check(written: Path, source: Path, files: Iterable[Path]) -> dict[str, str]:
    """Runs ONNX's checker on ``written`` and opens it in ONNX Runtime, in a process with limits. Returns for
    each check ``passed``, or the reason why there is no result if ``source`` fails as well. ``files`` are all
    files that ``source`` reads.

    Raises:
        ParityError: ``written`` fails where the source does not.
        OutOfLimits: a check takes too much memory or time.
    """
    results = {}
    for name, (problem, of_source) in problems(written, source, files).items():
        if problem is not None and of_source is None:
            raise ParityError(
                f"{name} does not accept the folded graph",
                where=written.name,
                found=problem,
                remedy="report this graph",
            )
        results[name] = "passed" if problem is None else f"not checked: the source fails too: {problem}"
    return results
