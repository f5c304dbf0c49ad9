"""Restores the base of a merged checkpoint byte for byte: copies a given base, or subtracts the packs and
verifies the result.

A merge rounds, so subtracting the change does not restore the base in general. The result is accepted if
three things hold: merging the packs into it gives the merged bytes; no neighbouring number would have given
them, so that no other base is possible; and its fingerprint is the one that the merge recorded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from ..adapter_methods import LAYOUTS, is_stacked, to_matrix
from ..base import Checkpoint, copy_carried, to_nearest
from ..errors import BaseMismatch, FormatError, Unsupported
from ..io import Json, Scratch, Span, copy_span, open_descriptor, output_folder, strict_json
from ..io import safetensors as st
from ..manifest import manifest as m
from ..pack import Pack, as_pack
from ..paths import StrPath
from .checkpoint import MergeBase, layout, plan
from .fold import prepare, slice_of

_NO_BASE = "give the base with base=BASE (--base BASE)"


@dataclass(frozen=True)
class UnmergeReport:
    """What :func:`unmerge` did. ``way`` is ``copied`` or ``computed``; ``proof`` is the strongest level of
    the base's fingerprint that the merge recorded and that was compared: ``content`` (every byte) or
    ``probe`` (samples of every tensor).
    """

    out: str
    way: str
    proof: str
    tensors: int

    def to_json(self) -> Json:
        """Returns the report as ``unmerge --json`` prints it."""
        return {"kind": "unmerge", **dataclasses.asdict(self)}


def unmerge(
    merged: StrPath,
    out: StrPath,
    *,
    base: StrPath | None = None,
    packs: Sequence[Pack | StrPath] = (),
) -> UnmergeReport:
    """Writes the base from which the checkpoint ``merged`` was made to ``out``: exactly, or not at all.

    Args:
        merged: a folder that :func:`adapterpack.merge` wrote.
        out: the folder to write; it must not exist.
        base: the base itself: it is verified and copied.
        packs: without a base, the packs that were merged: their change is subtracted, and the result
            verified.

    Raises:
        FormatError: ``merged`` does not record what it was made from.
        BaseMismatch: ``base`` or a pack is not the recorded one.
        Unsupported: the base cannot be computed from the merged bytes; says why.
        OutputExists, StorageError: the output cannot be written.

    Example:
        >>> unmerge("models/tickets", "models/base-again", base="models/base").proof  # doctest: +SKIP
        'content'
    """
    source = Checkpoint(merged)
    record = _merge_record(source)
    if base is not None:
        return _copy_base(record, Checkpoint(base), Path(out))
    if not packs:
        raise Unsupported(
            "a merged checkpoint alone does not hold its base",
            where=source.folder,
            expected="the base, or the packs",
            remedy=f"{_NO_BASE}, or the packs with packs=[PACK, ...] (--pack PACK)",
        )
    opened = [as_pack(pack) for pack in packs]
    return _compute_base(record, source, opened, Path(out))


def _merge_record(merged: Checkpoint) -> Json:
    """Returns the merge's record in the metadata of the files."""
    notes = {file.metadata.get(layout.NOTE) for file in merged.files.values()}
    try:
        (text,) = notes
        record = strict_json.loads((text or "").encode(), merged.folder, st.MAX_HEADER)
        _ = (
            record["base"]["structure"],
            record["base"]["probe"],
            [(pack["id"], float(pack["weight"])) for pack in record["packs"]],
        )
    except (FormatError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            "this checkpoint does not say what it was merged from",
            where=merged.folder,
            expected=f"'{layout.NOTE}' in the metadata of its files",
            remedy="name a folder that adapterpack merge wrote",
        ) from error
    checked: Json = record
    return checked


def _verify_base(record: Json, base: Checkpoint, where: object) -> str:
    """Compares a base with the recorded fingerprint; returns the strongest level that was compared."""
    for level in ("structure", "probe", "content"):
        wanted = record["base"].get(level)
        if wanted is not None and (actual := getattr(base, level)) != wanted:
            raise BaseMismatch(
                f"this is not the base that was merged into: its {level} differs",
                where=where,
                expected=wanted[:17],
                found=actual[:17],
                remedy="give the base that the merge names",
            )
    return "content" if record["base"].get("content") else "probe"


def _copy_base(record: Json, base: Checkpoint, out: Path) -> UnmergeReport:
    proof = _verify_base(record, base, base.folder)
    with output_folder(out) as folder:
        for name in (*base.files, *([base.index_name] if base.index is not None else [])):
            with (
                open_descriptor(base.folder / name, os.O_RDONLY) as source,
                open_descriptor(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as sink,
            ):
                copy_span(
                    source,
                    sink,
                    Span(0, 0, os.fstat(source).st_size),
                    lambda count: np.empty(count, np.uint8),
                )
        copy_carried(base.folder, folder)
        _verify_base(record, Checkpoint(folder), out)
        base.require_unchanged()
    return UnmergeReport(str(out), "copied", proof, len(base.tensors))


def _compute_base(record: Json, merged: Checkpoint, packs: list[Pack], out: Path) -> UnmergeReport:
    weights = {pack["id"]: float(pack["weight"]) for pack in record["packs"]}
    if sorted(weights) != sorted(pack.id for pack in packs):
        raise BaseMismatch(
            "these are not the packs that were merged",
            where=merged.folder,
            expected=", ".join(sorted(weights)),
            found=", ".join(pack.id for pack in packs),
            remedy="give just the packs that the merge names",
        )
    if record.get("stochastic_rounding") is not None:
        raise Unsupported("stochastic rounding cannot be undone", where=merged.folder, remedy=_NO_BASE)
    if any(pack.full() for pack in packs):
        raise Unsupported(
            "a module that was trained whole has taken the place of the base's",
            where=merged.folder,
            remedy=_NO_BASE,
        )
    source = MergeBase(merged.folder)
    if source.quantized:
        raise Unsupported(
            "codes of a quantized weight were chosen anew, and forgot the ones before",
            where=merged.folder,
            found=next(iter(source.quantized.values())).codec,
            remedy=_NO_BASE,
        )
    # The merged checkpoint has the base's names and shapes, but not its digests.
    unbound = [dataclasses.replace(pack, manifest=replace(pack.manifest, base=m.Base())) for pack in packs]
    todo = plan.make(source, unbound, [weights[pack.id] for pack in packs], True)
    with output_folder(out) as folder:
        for shard, file in merged.files.items():
            values = {
                name: _restore(merged, todo.targets[name], name) if name in todo.targets else file.read(name)
                for name in file.tensors
            }
            metadata = {key: value for key, value in file.metadata.items() if key != layout.NOTE}
            header, _ = st.plan(
                [(name, info.dtype, info.shape) for name, info in file.tensors.items()], metadata
            )
            with (folder / shard).open("xb") as sink:
                sink.write(header)
                for name in file.tensors:
                    sink.write(st.raw(values[name]))
        copy_carried(merged.folder, folder, [merged.index_name])
        proof = _verify_base(record, Checkpoint(folder), out)
    return UnmergeReport(str(out), "computed", proof, len(merged.tensors))


def _restore(merged: Checkpoint, target: plan.MergeTarget, name: str) -> np.ndarray:
    """Returns the only weight from which the merge gives the merged one."""
    if target.bias is not None or any(
        not one.method.traits.additive or one.method.traits.reads_weight for one in target.contributions
    ):
        raise Unsupported(
            "only what was added can be taken away again",
            where=name,
            found=", ".join(one.method.name for one in target.contributions),
            remedy=_NO_BASE,
        )
    stored = merged.read(name)
    work = target.storage.reader.work
    scratch = Scratch()
    result = np.empty_like(stored)
    matrices = (to_matrix(target.kind, value) for value in (stored, result))
    pairs = zip(*(matrix if is_stacked(target.kind) else [matrix] for matrix in matrices), strict=True)
    for number, (matrix, restored) in enumerate(pairs):
        change = prepare([slice_of(one, number) for one in target.contributions], work, matrix, None)
        delta = np.empty(matrix.shape, work)
        zero = np.zeros(matrix.shape, work)
        change.apply(zero, None, slice(0, len(matrix)), delta, np.empty_like(zero))
        restored[...] = to_nearest(matrix.astype(work) - delta, stored.dtype, scratch)
        if LAYOUTS[target.kind].turned:
            delta = np.ascontiguousarray(delta.T).T
        if not _folds_to(restored, delta, matrix):
            raise Unsupported(
                "the merged bytes do not come back: rounding left too little of the base",
                where=name,
                remedy=_NO_BASE,
            )
        for direction in (np.inf, -np.inf):
            neighbours = _next(restored, direction)
            several = int(np.count_nonzero((neighbours.astype(work) + delta).astype(stored.dtype) == matrix))
            if several:
                raise Unsupported(
                    "several weights of the base would have given the merged one: rounding forgot which "
                    "it was",
                    where=name,
                    found=f"at {several:,} of {matrix.size:,} numbers",
                    remedy=_NO_BASE,
                )
    return result


def _folds_to(restored: np.ndarray, delta: np.ndarray, matrix: np.ndarray) -> bool:
    folded = (restored.astype(delta.dtype) + delta).astype(matrix.dtype)
    return np.array_equal(
        np.ascontiguousarray(folded).view(np.uint8), np.ascontiguousarray(matrix).view(np.uint8)
    )


def _next(value: np.ndarray, towards: float) -> np.ndarray:
    """Returns the next number of the dtype, up or down."""
    kind = value.dtype.type
    neighbours: np.ndarray = np.nextafter(value, kind(towards))
    return neighbours
