"""The merge stage: adapters folded into a checkpoint that is streamed from disk to disk."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, NothingToDo, StorageError, storage_errors
from ..pack import strict_json
from ..pack.atomic import output_folder, refuse_existing
from ..pack.checkpoint import INDEX, Checkpoint, carried_files
from ..pack.pack import Pack
from ..pack.validate import load
from . import config, dtypes, layout, plan, stream
from .codecs.view import Decoded
from .report import MergedPack, MergeReport

PROVENANCE = "adapterpack.merge.json"
METADATA = "adapterpack_merge"
_MAX_WORKERS = 4
_SIDE_FILES = 1 << 20


def merge(
    base: str | os.PathLike[str],
    packs: Sequence[Pack | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    safe: bool = False,
    allow_structural: bool = False,
    progress: stream.Progress | None = None,
) -> MergeReport:
    """Folds ``packs`` into the checkpoint ``base`` and writes the result to the new folder ``out``, whole or not at all.

    Every changed weight is read block by block, all its adapters are added in float32 (float64 for a float64 base), and the sum is
    rounded once, to nearest even; all other bytes are copied. Memory does not grow with the model. Modules that a pack holds trained
    whole, such as a classifier head, go along. Equal inputs give equal bytes.

    A quantized base is decoded, folded and encoded again in its own format: every group of codes keeps its scale, or takes a new one where
    that comes closer to the fold. With ``dtype`` it is written dequantized instead, which loses nothing but that dtype's rounding.

    Args:
        base: a checkpoint folder; it is never changed.
        packs: packs or their folders; ``weights`` multiply their changes (1 each by default; additive methods only; heads are not scaled).
        out: the folder to write; it must not exist.
        dtype: the dtype of all floating tensors of the output, such as ``"bfloat16"``; by default each keeps its own.
            A quantized base is written dequantized.
        safe: refuse a result that is NaN or infinite, overflow in rounding included.
        allow_structural: accept a base that has the names, dtypes and shapes of the pack's, whatever its weights.
        progress: called with (bytes done, bytes in all), by one thread at a time.

    Raises:
        OutputExists, ConfigError: the output path or an argument cannot be used.
        BaseMismatch, SiteNotFound: a pack was made for another base.
        Unsupported: the fold would not be exact.
        NothingToDo: no weight would change, or none did after rounding.
        NonFinite: under ``safe``.
        StorageError: the disk is full, or the file system refuses.

    Example:
        >>> report = merge("models/base", ["packs/tickets"], "models/tickets")  # doctest: +SKIP
        >>> report.tensors_changed, report.kept  # doctest: +SKIP
        (24, 0.9999999)
    """
    started = time.perf_counter()
    target = Path(out)
    refuse_existing(target)
    asked = None if dtype is None else dtypes.parse(dtype)
    checkpoint = Decoded(base)
    opened = [pack if isinstance(pack, Pack) else load(pack) for pack in packs]
    factors = _weights(weights, opened)
    _require_outside(target, [checkpoint.folder, *(pack.path for pack in opened if pack.path is not None)])
    todo = plan.make(checkpoint, opened, factors, allow_structural, dequantize=asked is not None)
    merged = tuple(MergedPack(pack.name, pack.id, factor, verdict.name)
                   for pack, factor, verdict in zip(opened, factors, todo.verdicts, strict=True))
    _require_space(target, _SIDE_FILES + sum(shard.size for shard in layout.shards(checkpoint, todo, asked, {})))
    note = {"base": checkpoint.content, "packs": [{"id": pack.id, "weight": pack.weight} for pack in merged]}
    shards = layout.shards(checkpoint, todo, asked, {METADATA: json.dumps(note, sort_keys=True)})
    with output_folder(target) as folder:
        losses = stream.write(shards, folder, safe=safe, workers=_workers(), progress=progress)
        if losses and not any(loss.stored for loss in losses) and not todo.whole.added and not todo.whole.replaced:
            raise NothingToDo("the whole change was lost in rounding: the output would equal the base", where=target, found=losses[0].dtype,
                              remedy="merge with dtype float32, or keep the adapter beside the base")
        report = MergeReport(
            out=str(target),
            base_name=checkpoint.name,
            base_structure=checkpoint.structure,
            base_content=checkpoint.content,
            packs=merged,
            dtype=None if asked is None else dtypes.TORCH[asked],
            tensors=sum(len(shard.items) for shard in shards),
            tensors_changed=sum(item.changed for shard in shards for item in shard.items),
            tensors_added=len(todo.whole.added),
            bytes_written=sum(shard.size for shard in shards),
            seconds=0.0,
            losses=tuple(losses),
        )
        _copy_side_files(folder, checkpoint, config.merged(checkpoint.config, opened, todo.whole, asked))
        _write_json(folder / INDEX, layout.index(checkpoint, shards))
        (folder / PROVENANCE).write_bytes(strict_json.canonical(report.provenance()))
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _weights(weights: Sequence[float] | None, packs: Sequence[Pack]) -> list[float]:
    factors = [1.0] * len(packs) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(packs):
        raise ConfigError("every pack needs a weight", where="weights", expected=len(packs), found=len(factors),
                          remedy="give as many weights as packs")
    for factor in factors:
        if not math.isfinite(factor):
            raise ConfigError("a weight must be a finite number", where="weights", found=factor, remedy="give a number such as 0.5")
    return factors


def _require_outside(out: Path, inputs: Sequence[Path]) -> None:
    for folder in inputs:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError("the output would lie inside an input, and inputs are never changed", where=out, found=folder,
                              remedy="choose a folder outside it")


def _require_space(out: Path, needed: int) -> None:
    with storage_errors(out):
        parent = next(folder for folder in out.resolve().parents if folder.exists())
        free = shutil.disk_usage(parent).free
    if free < needed:
        raise StorageError("there is not enough space on the disk", where=parent, expected=f"{needed:,} bytes",
                           found=f"{free:,} bytes free", remedy="free some space or choose another output folder")


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MAX_WORKERS)


def _copy_side_files(folder: Path, base: Checkpoint, changed: dict[str, Any]) -> None:
    for path in carried_files(base.folder):
        shutil.copyfile(path, folder / path.name)
    if base.config and changed != base.config:
        _write_json(folder / "config.json", changed)


def _write_json(path: Path, value: dict[str, Any] | None) -> None:
    if value is not None:
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
