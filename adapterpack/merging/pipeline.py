"""Merges adapters into a checkpoint, which is streamed from disk to disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ..base import dtypes, rounding
from ..errors import ConfigError, NothingToDo
from ..io import Progress, refuse_existing, workers
from ..pack import Pack, as_pack, weights_of
from ..paths import StrPath
from ..version import VERSION
from .base_kind import is_gguf, is_graph
from .checkpoint import (
    Fold,
    MergeBase,
    MergedPack,
    MergeReport,
    jobs,
    journal,
    layout,
    plan,
    provenance,
    require_outside,
    staging,
    stream,
)
from .fold import choose_arithmetic
from .onnx.report import GraphReport

VERIFY = ("structure", "full")
_SIDE_FILES = 1 << 20
LayOut = Callable[[Any, plan.MergePlan, "str | None", str], list[layout.Shard]]


def merge(
    base: StrPath,
    packs: Sequence[Pack | StrPath],
    out: StrPath,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    safe: bool = False,
    stochastic_rounding: int | None = None,
    verify: str = "structure",
    allow_structural: bool = False,
    shard: str | None = None,
    resume: bool = False,
    durable: bool = True,
    device: str | None = None,
    untie: bool = False,
    checkpoint: StrPath | None = None,
    progress: Progress | None = None,
) -> MergeReport | GraphReport:
    """Folds ``packs`` into ``base`` (a checkpoint, a GGUF file, an ONNX file or a bundle) and writes the
    result to ``out``, whole or not at all.

    Every changed weight is read block by block, all its adapters are added in float32 (float64 for a float64
    base), and the sum is rounded once, to nearest even; all other bytes are copied. Memory does not grow with
    the model. Fully trained modules of a pack, such as a classifier head, are included. Equal inputs give
    equal bytes. If one adapter is not additive, they are folded one after the other, in the order of the
    packs. A merge that was killed resumes where it stopped when it is run again.

    A quantized base is decoded, folded and encoded again in its own format: every group of codes keeps its
    scale, or takes a new one where that comes closer to the fold. With ``dtype`` it is written dequantized
    instead, which loses nothing but that dtype's rounding.

    Args:
        base: a checkpoint folder, a GGUF file, an ONNX file or a bundle; it is never changed. What a graph
            becomes says
            :func:`~adapterpack.merging.onnx.pipeline.merge_graph`.
        packs: packs or their folders; ``weights`` multiply their changes (1 each by default; additive methods
            only; heads are not scaled).
        out: the folder or file to write; it must not exist.
        dtype: the dtype of all floating tensors of the output, such as ``"bfloat16"``; by default each keeps
            its own. A quantized base is written dequantized.
        safe: refuse a number that is too large for the dtype that it is stored in, too, which else becomes
            infinite.
        stochastic_rounding: a seed: round up or down by chance, so that small changes are kept on average.
            Not for the codes of a quantized base.
        verify: ``"structure"`` checks the base by names, dtypes, shapes and samples of every tensor;
            ``"full"`` by every byte.
        allow_structural: accept a base that has the names, dtypes and shapes of the pack's, whatever its
            weights.
        shard: ``"I/N"``: do the I-th of N shares of the work, into an output folder that N machines share;
            the last one publishes it.
        resume: keep what is done on an error or an interrupt, too, to go on with later.
        durable: wait until every byte is on the disk; without it the system writes them out in its own time,
            as after a copy.
        device: ``"cuda"`` or ``"cpu"``: compute with torch there; by default with numpy, without torch.
        untie: write the output head of a model whose embeddings are tied as a tensor of its own, so that each
            use of them is changed by what was trained for it.
        checkpoint: of an ONNX or GGUF file, the checkpoint that it was made from: the numbers of both are
            compared.
        progress: called with (bytes done, bytes in all), by one thread at a time.

    Raises:
        OutputExists, ConfigError: the output path or an argument cannot be used.
        BaseMismatch, SiteNotFound: a pack was made for another base.
        Unsupported: the fold would not be exact.
        NothingToDo: no weight would change, or none did after rounding.
        NonFinite: a result is NaN, or beyond float32; under ``safe``, too large for its dtype.
        StorageError: the disk is full, or the file system refuses.

    Example:
        >>> report = merge("models/base", ["packs/tickets"], "models/tickets")  # doctest: +SKIP
        >>> report.tensors_changed, report.kept  # doctest: +SKIP
        (24, 0.9999999)
    """
    if is_graph(base):
        of_checkpoints = {
            "dtype": dtype,
            "stochastic_rounding": stochastic_rounding,
            "shard": shard,
            "resume": resume,
            "device": device,
            "untie": untie,
        }
        return _into_graph(
            base,
            packs,
            out,
            of_checkpoints,
            checkpoint=checkpoint,
            weights=weights,
            safe=safe,
            allow_structural=allow_structural,
            progress=progress,
        )
    started = time.perf_counter()
    target = Path(out)
    refuse_existing(target)
    if verify not in VERIFY:
        raise ConfigError(
            "there is no such check of the base",
            where="verify",
            expected=" or ".join(VERIFY),
            found=repr(verify),
        )
    out_dtype = None if dtype is None else dtypes.parse(dtype)
    share = jobs.JobShare() if shard is None else jobs.parse_share(shard)
    arithmetic = choose_arithmetic(device, stochastic_rounding is not None)
    opened = [as_pack(pack) for pack in packs]
    source, lay_out, file = _open_base(base, checkpoint)
    if file is None and target.suffix in {".gguf", ".onnx"}:
        raise ConfigError(
            "a merged checkpoint is a folder",
            where=target,
            found=f"the name of a {target.suffix} file",
            remedy="to write such a file, give one as BASE, and this base as --base; else name a folder",
        )
    factors = weights_of(opened, weights, 1.0)
    require_outside(target, [*source.inputs, *(pack.path for pack in opened if pack.path is not None)])
    todo = plan.make(
        source,
        opened,
        factors,
        allow_structural,
        dtype=out_dtype,
        full=verify == "full",
        stochastic=stochastic_rounding is not None,
        untie=untie,
    )
    if verify == "full":
        _ = source.content
    merged = tuple(
        MergedPack(pack.name, pack.id, factor, verdict.name)
        for pack, factor, verdict in zip(opened, factors, todo.verdicts, strict=True)
    )
    note = provenance.note(source, merged, stochastic_rounding)
    shards = lay_out(source, todo, out_dtype, note)
    key = provenance.key(
        [shard.header for shard in shards], {"version": VERSION, "safe": safe, "device": device}
    )
    work = jobs.jobs(shards)
    mine, folder = jobs.jobs_of(work, share), staging.folder_for(target, key)
    staging.require_space(
        target, _SIDE_FILES + sum(shard.size for shard in shards) - staging.bytes_on_disk(folder)
    )

    def report_of(done: journal.Finished, missing: int) -> MergeReport:
        losses = [
            job.loss(sums)
            for number, job in enumerate(work)
            if isinstance(job, Fold) and (sums := done.get(number)) is not None
        ]
        return MergeReport(
            out=str(target),
            base_name=source.name,
            base_structure=source.structure,
            base_probe=source.probe,
            base_content=provenance.content_if_read(source),
            packs=merged,
            dtype=None if out_dtype is None else dtypes.TORCH[out_dtype],
            tensors=sum(len(shard.items) for shard in shards),
            tensors_changed=sum(item.changed for shard in shards for item in shard.items),
            tensors_added=len(todo.full_modules.added) + len(todo.copies),
            bytes_written=sum(shard.size for shard in shards),
            seconds=time.perf_counter() - started,
            losses=tuple(losses),
            stochastic_rounding=stochastic_rounding,
            shard=None if shard is None else str(share),
            jobs_missing=missing,
            bytes_resumed=resumed,
            notes=todo.notes,
        )

    def finish(folder: Path) -> None:
        report = report_of(done, 0)
        if (
            report.losses
            and not any(loss.stored for loss in report.losses)
            and not (todo.full_modules.added or todo.full_modules.replaced)
        ):
            raise NothingToDo(
                "the whole change was lost in rounding: the output would equal the base",
                where=target,
                found=report.losses[0].dtype,
                remedy="merge with dtype float32, or keep the adapter unmerged",
            )
        if file is None:  # a GGUF file is complete with its tensors
            provenance.write_side_files(folder, source, opened, todo, out_dtype, shards, report.provenance())

    several = share.count > 1
    files = {file for number in mine for file in work[number].files}
    with staging.open_staging(
        target, folder, lambda path: journal.Journal(path, share, files), keep=resume or several
    ) as log:
        done_before = journal.read_finished_jobs(folder, len(work))
        resumed = sum(work[number].nbytes for number in mine if number in done_before)
        stream.create_files(shards, folder)
        with _of_one_base(source, verify), log.synced() if durable or several else nullcontext():
            done = stream.write(
                work,
                mine,
                done_before,
                log,
                header=sum(len(shard.header) for shard in shards),
                safe=safe,
                rounding=_rounding(stochastic_rounding),
                arithmetic=arithmetic,
                workers=workers(),
                progress=progress,
            )
        if several:
            # another share on this machine saw that everything was done, synced and published it
            with suppress(FileNotFoundError):
                log.sync()
            done = journal.read_finished_jobs(folder, len(work))
        missing = len(work) - len(done)
        if not missing:
            staging.publish(folder, target, finish, durable, file)
    return report_of(done, missing)


def _open_base(base: StrPath, checkpoint: StrPath | None) -> tuple[MergeBase, LayOut, str | None]:
    """Opens the base at a path, and returns it with the function that lays out the output, which has the
    base's form: a folder of safetensors, or one GGUF file, whose name comes last.

    Raises:
        StorageError, FormatError, Unsupported: it cannot be read.
        ConfigError: a checkpoint was given although the base is one.
    """
    if is_gguf(base):
        from .gguf import layout as gguf_layout  # noqa: PLC0415 - checkpoints need none of it
        from .gguf.base_model import GGUFBase  # noqa: PLC0415 - as below

        return GGUFBase(base, checkpoint), gguf_layout.shards, gguf_layout.NAME
    if checkpoint is not None:
        raise ConfigError(
            "only an ONNX graph or a GGUF file is merged together with its checkpoint",
            where=base,
            remedy="leave --base out",
        )
    return MergeBase(base), layout.shards, None


@contextmanager
def _of_one_base(source: MergeBase, verify: str) -> Iterator[None]:
    """Checks after the block, even after an error, that the base has not changed since it was opened; a
    result of two different bases is discarded.
    """
    try:
        yield
    finally:
        source.require_unchanged(exact=verify == "full")


def _rounding(seed: int | None) -> rounding.Rounding:
    return rounding.nearest if seed is None else rounding.stochastic(seed)


def _into_graph(
    base: StrPath,
    packs: Sequence[Pack | StrPath],
    out: StrPath,
    of_checkpoints: Mapping[str, Any],
    **rest: Any,
) -> GraphReport:
    from .onnx.pipeline import merge_graph  # noqa: PLC0415 - a checkpoint needs none of it

    for name, value in of_checkpoints.items():
        if value is not None and value is not False:
            raise ConfigError(
                "this is for merges into checkpoints; a graph keeps its dtypes and is merged in one go",
                where=name,
                found=repr(value),
                remedy="leave it out",
            )
    return merge_graph(base, packs, out, **rest)
