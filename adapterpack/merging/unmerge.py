"""The base of a merged checkpoint, byte for byte: copied from the base where it is at hand, else computed back and proven, else refused.

A merge rounds, so taking the change away again does not give the base in general. It is the base where three things hold: folding the
packs into what was computed gives the merged bytes; no neighbour of a number in it would have given them, so that nothing else can have
been there; and the fingerprint is the one that the merge wrote down.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter_methods import LAYOUTS, is_stacked, to_matrix
from ..base.checkpoint import INDEX, Checkpoint, carried_files
from ..base.rounding import to_nearest
from ..errors import BaseMismatch, FormatError, Unsupported
from ..io import safetensors as st
from ..io.atomic import output_folder
from ..io.buffers import Scratch
from ..io.byte_ranges import Span, copy_span, opened
from ..manifest import manifest as m
from ..pack.pack import Pack
from ..pack.validate.validation import load
from . import plan, provenance
from .base_model import MergeBase
from .fold.blocks import InNumpy
from .fold.fold import Change, slice_of

_NO_BASE = "give the base with base=BASE (--base BASE)"


@dataclass(frozen=True)
class UnmergeReport:
    """What :func:`unmerge` did. ``way`` is ``copied`` or ``computed``; ``proof`` is the strongest level of the base's fingerprint that the
    merge had written down and that was compared: ``content`` (every byte) or ``probe`` (samples of every tensor)."""

    out: str
    way: str
    proof: str
    tensors: int

    def to_json(self) -> dict[str, Any]:
        """The report as ``unmerge --json`` prints it."""
        return {"kind": "unmerge", "out": self.out, "way": self.way, "proof": self.proof, "tensors": self.tensors}


def unmerge(merged: str | os.PathLike[str], out: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None,
            packs: Sequence[Pack | str | os.PathLike[str]] = ()) -> UnmergeReport:
    """Writes the base that the checkpoint ``merged`` was made from to the new folder ``out``: exactly, or not at all.

    Args:
        merged: a folder that :func:`adapterpack.merge` wrote.
        out: the folder to write; it must not exist.
        base: the base itself: it is proven to be the one, and copied.
        packs: without a base, the packs that were merged: their change is taken away, and the result proven.

    Raises:
        FormatError: ``merged`` does not say what it was made from.
        BaseMismatch: ``base`` or a pack is another one.
        Unsupported: the base cannot be told from the merged bytes; says why.
        OutputExists, StorageError: the output cannot be written.

    Example:
        >>> unmerge("models/tickets", "models/base-again", base="models/base").proof  # doctest: +SKIP
        'content'
    """
    source = Checkpoint(merged)
    told = _told(source)
    if base is not None:
        return _copied(told, Checkpoint(base), Path(out))
    if not packs:
        raise Unsupported("a merged checkpoint alone does not hold its base", where=source.folder, expected="the base, or the packs",
                          remedy=f"{_NO_BASE}, or the packs with packs=[PACK, ...] (--pack PACK)")
    return _computed(told, source, [pack if isinstance(pack, Pack) else load(pack) for pack in packs], Path(out))


def _told(merged: Checkpoint) -> dict[str, Any]:
    """What the merge wrote into the metadata."""
    notes = {file.metadata.get(provenance.METADATA) for file in merged.files.values()}
    try:
        (text,) = notes
        found = json.loads(text or "")
        _ = found["base"]["structure"], found["base"]["probe"], [(pack["id"], float(pack["weight"])) for pack in found["packs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError("this checkpoint does not say what it was merged from", where=merged.folder,
                          expected=f"'{provenance.METADATA}' in the metadata of its files",
                          remedy="name a folder that adapterpack merge wrote") from error
    result: dict[str, Any] = found
    return result


def _proven(told: dict[str, Any], found: Checkpoint, where: object) -> str:
    """The strongest level that was compared."""
    for level in ("structure", "probe", "content"):
        wanted = told["base"].get(level)
        if wanted is not None and (actual := getattr(found, level)) != wanted:
            raise BaseMismatch(f"this is not the base that was merged into: its {level} differs", where=where, expected=wanted[:17],
                               found=actual[:17], remedy="give the base that the merge names")
    return "content" if told["base"].get("content") else "probe"


def _copied(told: dict[str, Any], base: Checkpoint, out: Path) -> UnmergeReport:
    proof = _proven(told, base, base.folder)
    with output_folder(out) as folder:
        for name in (*base.files, *([INDEX] if base.index is not None else [])):
            with opened(base.folder / name, os.O_RDONLY) as source, opened(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as sink:
                copy_span(source, sink, Span(0, 0, os.fstat(source).st_size), lambda count: np.empty(count, np.uint8))
        for path in carried_files(base.folder):
            shutil.copyfile(path, folder / path.name)
        _proven(told, Checkpoint(folder), out)
    return UnmergeReport(str(out), "copied", proof, len(base.tensors))


def _computed(told: dict[str, Any], merged: Checkpoint, packs: list[Pack], out: Path) -> UnmergeReport:
    weights = {pack["id"]: float(pack["weight"]) for pack in told["packs"]}
    if sorted(weights) != sorted(pack.id for pack in packs):
        raise BaseMismatch("these are not the packs that were merged", where=merged.folder, expected=", ".join(sorted(weights)),
                           found=", ".join(pack.id for pack in packs), remedy="give just the packs that the merge names")
    if told.get("stochastic_rounding") is not None:
        raise Unsupported("what was rounded by chance cannot be computed back", where=merged.folder, remedy=_NO_BASE)
    if any(pack.full() for pack in packs):
        raise Unsupported("a module that was trained whole has taken the place of the base's", where=merged.folder, remedy=_NO_BASE)
    source = MergeBase(merged.folder)
    if source.quantized:
        raise Unsupported("codes of a quantized weight were chosen anew, and forgot the ones before", where=merged.folder,
                          found=next(iter(source.quantized.values())).codec, remedy=_NO_BASE)
    # The merged checkpoint has the base's names and shapes, and not its digests.
    unbound = [dataclasses.replace(pack, manifest=dataclasses.replace(pack.manifest, base=m.Base())) for pack in packs]
    todo = plan.make(source, unbound, [weights[pack.id] for pack in packs], True)
    with output_folder(out) as folder:
        for shard, file in merged.files.items():
            values = {name: _restored(merged, todo.targets[name], name) if name in todo.targets else file.read(name)
                      for name in file.tensors}
            metadata = {key: value for key, value in file.metadata.items() if key != provenance.METADATA}
            header, _ = st.plan([(name, info.dtype, info.shape) for name, info in file.tensors.items()], metadata)
            with (folder / shard).open("xb") as sink:
                sink.write(header)
                for name in file.tensors:
                    sink.write(np.ascontiguousarray(values[name]).data.cast("B") if values[name].size else b"")
        for path in carried_files(merged.folder, [INDEX]):
            shutil.copyfile(path, folder / path.name)
        proof = _proven(told, Checkpoint(folder), out)
    return UnmergeReport(str(out), "computed", proof, len(merged.tensors))


def _restored(merged: Checkpoint, target: plan.Target, name: str) -> np.ndarray:
    """The one weight that the fold turns into the merged one."""
    if target.bias is not None or any(not each.method.traits.additive or each.method.traits.reads_weight
                                         for each in target.contributions):
        raise Unsupported("only what was added can be taken away again", where=name,
                          found=", ".join(each.method.name for each in target.contributions), remedy=_NO_BASE)
    stored = merged.read(name)
    work, numpy, scratch = target.storage.reader.work, InNumpy(), Scratch()
    result = np.empty_like(stored)
    pairs = zip(*(each if is_stacked(target.kind) else [each] for each in (to_matrix(target.kind, value) for value in (stored, result))),
                strict=True)
    for number, (matrix, restored) in enumerate(pairs):
        change: Change = numpy.prepare([slice_of(each, number) for each in target.contributions], work, matrix, None)
        delta, zero = np.empty(matrix.shape, work), np.zeros(matrix.shape, work)
        change.apply(zero, None, slice(0, len(matrix)), delta, np.empty_like(zero))
        restored[...] = to_nearest(matrix.astype(work) - delta, stored.dtype, scratch)
        if LAYOUTS[target.kind].turned:
            delta = np.ascontiguousarray(delta.T).T
        if not _folds_to(restored, delta, matrix):
            raise Unsupported("the merged bytes do not come back: rounding left too little of the base", where=name,
                              remedy=_NO_BASE)
        for beyond in (np.inf, -np.inf):
            beside = _next(restored, beyond)
            several = int(np.count_nonzero((beside.astype(work) + delta).astype(stored.dtype) == matrix))
            if several:
                raise Unsupported("several weights of the base would have given the merged one: rounding forgot which it was", where=name,
                                  found=f"at {several:,} of {matrix.size:,} numbers", remedy=_NO_BASE)
    return result


def _folds_to(restored: np.ndarray, delta: np.ndarray, matrix: np.ndarray) -> bool:
    folded = (restored.astype(delta.dtype) + delta).astype(matrix.dtype)
    return np.array_equal(np.ascontiguousarray(folded).view(np.uint8), np.ascontiguousarray(matrix).view(np.uint8))


def _next(value: np.ndarray, towards: float) -> np.ndarray:
    """The next number of the dtype, up or down."""
    kind = value.dtype.type
    found: np.ndarray = np.nextafter(value, kind(towards))
    return found
