"""Lays out the output files of a merge: which tensors are in each, in which order, and where their bytes come
from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...base import Checkpoint, WeightStorage, name_rows, rows_between
from ...base.codecs.plain import plain_writer
from ...errors import Unsupported
from ...io import DTYPES, FLOATS, Json, TensorInfo, dtype_name, plan
from .base_model import MergeBase
from .plan import MergePlan, MergeTarget

_Entry = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Item:
    """One tensor of an output shard: its position (``place``), and where its bytes come from.

    Exactly one of: ``value`` (of a fully trained module); ``storage`` (a weight of the base that is decoded
    and encoded again, changed if ``target`` is set); ``source`` (a tensor of the base that is copied or, as a
    bias or part of a quantized weight, written together with the weight that ``written_with`` names).
    ``bias`` says that it is a bias. Or ``pieces`` are the rows of the tensor, each from a source of its own.
    """

    place: TensorInfo
    source: TensorInfo | None = None
    storage: WeightStorage | None = None
    target: MergeTarget | None = None
    value: np.ndarray | None = None
    added: bool = False
    written_with: str | None = None
    bias: bool = False
    pieces: tuple[Item, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether this is a tensor of the base whose numbers the merge changes; a quantized weight counts
        once.
        """
        changed = self.target is not None or self.bias or (self.value is not None and not self.added)
        return changed or any(piece.changed for piece in self.pieces)


@dataclass(frozen=True)
class Shard:
    """One output file with its header; ``base`` is the file that it is made from, ``items`` are in the order
    of their offsets.

    ``tail`` zero bytes follow the last item.
    """

    name: str
    base: Path
    header: bytes
    items: tuple[Item, ...]
    tail: int = 0

    @property
    def size(self) -> int:
        """The bytes of the finished file."""
        return (
            max([len(self.header), *(item.place.offset + item.place.nbytes for item in self.items)])
            + self.tail
        )


NOTE = "adapterpack_merge"
"""The key in the metadata of a file under which it says what it was merged from."""


def shards(base: MergeBase, todo: MergePlan, dtype: str | None, note: str) -> list[Shard]:
    """Returns the output's shards: the base's, with the same tensors in the same order; added tensors go to
    the end of the last shard. ``note`` says in the metadata of each what it was merged from.

    With ``dtype``, a weight that the base stores quantized becomes one tensor of that dtype, at the place of
    its first part.
    """
    last = list(base.files)[-1]
    folds = sources(todo)
    built = []
    written = set()
    cuts = _cuts(base, [*folds, *todo.full_modules.replaced])

    def source(name: str, info: TensorInfo, recoded: bool = False) -> Json:
        """Returns where the bytes of a tensor, or of rows of one, come from."""
        if (value := todo.full_modules.replaced.get(name)) is not None:
            return {"value": value}
        if name in folds:
            return folds[name] | ({"source": info} if "written_with" in folds[name] else {})
        if recoded or _output(info.dtype, dtype) != info.dtype:
            return {"storage": base.storage(name, dtype)}
        return {"source": info}

    def item(place: TensorInfo, given: dict[str, Any]) -> Item:
        """Returns the item at a place; that of a tensor of which rows change has pieces."""
        if "cuts" not in given:
            return Item(place, **given)
        info: TensorInfo = given["source"]
        pieces = (
            Item(rows_between(place, *cut), **source(name_rows(info.name, *cut), rows_between(info, *cut)))
            for cut in given["cuts"]
        )
        return Item(place, pieces=tuple(pieces))

    for shard, file in base.files.items():
        items: dict[str, Json] = {}
        entries: list[_Entry] = []
        for stored, info in file.tensors.items():
            name = stored if dtype is None else base.part_owners.get(stored, (stored, ""))[0]
            recoded = dtype is not None and name in base.quantized
            if recoded and name in written:
                continue
            written.add(name)
            decoded = base.tensors[name] if recoded else info
            value = todo.full_modules.replaced.get(name)
            out = _output(decoded.dtype, dtype)
            entries.append(
                (todo.full_modules.prefix + name, out, decoded.shape if value is None else value.shape)
            )
            items[todo.full_modules.prefix + name] = (
                {"source": info, "cuts": cuts[name]} if name in cuts else source(name, info, recoded)
            )
        for name, copied in todo.copies.items():
            if copied in file.tensors or (dtype is not None and copied in base.quantized and shard == last):
                info = base.tensors[copied]
                out = _output(info.dtype, dtype)
                entries.append((name, out, info.shape))
                reader = base.storage(copied, dtype).reader
                items[name] = (
                    folds[name]
                    if name in folds
                    else (
                        {"source": info}
                        if out == info.dtype and copied not in base.quantized
                        else {"storage": WeightStorage(reader, plain_writer(name, out))}
                    )
                )
        if shard == last:
            for name, value in todo.full_modules.added.items():
                entries.append((name, _output(dtype_name(value.dtype), dtype), value.shape))
                items[name] = {"value": value, "added": True}
        start = min((info.offset for info in file.tensors.values()), default=8)
        # it may describe the parts of quantized weights
        kept = file.metadata if dtype is None or not base.quantized else {}
        header, places = _align(entries, {"format": "pt", **kept, NOTE: note}, start)
        built.append(
            Shard(shard, file.path, header, tuple(item(place, items[name]) for name, place in places.items()))
        )
    return built


def _cuts(base: MergeBase, names: Iterable[str]) -> dict[str, list[tuple[int, int]]]:
    """Returns how tensors are cut of which ``names`` are rows: into these, and the rows between them.

    Raises:
        Unsupported: two names share rows.
    """
    places = {name: base.stored.place(name) for name in names if name in base.stored}
    changed: dict[str, list[tuple[int, int]]] = {}
    for whole, rows in places.values():
        if rows != slice(None):
            changed.setdefault(whole, []).append((rows.start, rows.stop))
    for whole, spans in changed.items():
        edges = [0, *(edge for span in sorted(spans) for edge in span), base.stored[whole].shape[0]]
        if edges != sorted(edges) or places.get(whole) == (whole, slice(None)):
            raise Unsupported(
                "several adapters change the same rows of a tensor as weights of different modules",
                where=f"{base.where}, {whole}",
                found=", ".join(sorted(name for name in places if places[name][0] == whole)),
                remedy="merge one of them, and the other into the result",
            )
        changed[whole] = [cut for cut in pairwise(edges) if cut[0] < cut[1]]
    return changed


def sources(todo: MergePlan) -> dict[str, Json]:
    """Returns where the bytes of the changed tensors come from, by the tensor's name in the base."""
    by_tensor: dict[str, Json] = {}
    for name, target in todo.targets.items():
        by_tensor[target.storage.main_tensor] = {"storage": target.storage, "target": target}
        by_tensor |= {other: {"written_with": name} for other in target.storage.companions}
        if target.bias is not None:
            by_tensor[target.bias] = {"written_with": name, "bias": True}
    return by_tensor


def index(base: Checkpoint, built: list[Shard]) -> Json | None:
    """Returns the index of a sharded output, or None for a single file."""
    if base.index is None:
        return None
    total = sum(item.place.nbytes for shard in built for item in shard.items)
    metadata = {**base.index.get("metadata", {}), "total_size": total}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(
            int(np.prod(item.place.shape, dtype=object)) for shard in built for item in shard.items
        )
    return {
        "metadata": metadata,
        "weight_map": {item.place.name: shard.name for shard in built for item in shard.items},
    }


def _output(stored: str, dtype: str | None) -> str:
    return dtype if dtype is not None and stored in FLOATS else stored


def _align(
    entries: list[_Entry], metadata: Mapping[str, str], start: int
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Returns header and positions of tensors in the given order, or with wide dtypes first if that order
    would misalign a tensor that readers map.

    ``start`` is where the tensors begin in the base's file: here they begin at the same offset within a page,
    so that a file system that can share pages between files shares those of unchanged tensors.
    """
    header, places = plan(entries, metadata, start)
    if any(place.offset % DTYPES[place.dtype].itemsize for place in places.values()):
        header, places = plan(sorted(entries, key=lambda entry: -DTYPES[entry[1]].itemsize), metadata, start)
    return header, places
