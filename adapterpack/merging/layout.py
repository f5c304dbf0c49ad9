"""The shards of the output: which tensors each holds, in which order, and where each one's bytes come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..base.checkpoint import Checkpoint
from ..base.codecs.plain import PlainWriter
from ..base.codecs.storage import Storage
from ..io.safetensors import DTYPES, FLOATS, TensorInfo, dtype_name, plan
from .base_model import MergeBase
from .plan import Plan, Target

_Entry = tuple[str, str, tuple[int, ...]]


class BaseFile(Protocol):
    """A file of the base: where it is, and its tensors as they are stored."""

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    def read(self, name: str) -> np.ndarray:
        """A tensor, as a view of the file."""
        ...


@dataclass(frozen=True)
class Item:
    """One tensor of an output shard: its place, and where its bytes come from.

    Exactly one of: ``value`` (a module trained whole); ``storage`` (a weight of the base, read and written anew, folded if ``target`` is
    set); ``source`` (a tensor of the base, copied, or changed with the weight that ``written_with`` names, if it is a bias or a part of one
    that is quantized). ``bias`` says that it is a bias.
    """

    place: TensorInfo
    source: TensorInfo | None = None
    storage: Storage | None = None
    target: Target | None = None
    value: np.ndarray | None = None
    added: bool = False
    written_with: str | None = None
    bias: bool = False

    @property
    def changed(self) -> bool:
        """Whether this is a tensor of the base whose numbers the merge changes; a quantized weight counts once."""
        return self.target is not None or self.bias or (self.value is not None and not self.added)


@dataclass(frozen=True)
class Shard:
    """One output file, its header ready; ``base`` is the file that it is made from, ``items`` are in the order of their offsets.

    ``tail`` are bytes of zero after the last of them.
    """

    name: str
    base: BaseFile
    header: bytes
    items: tuple[Item, ...]
    tail: int = 0

    @property
    def size(self) -> int:
        """The bytes of the finished file."""
        return max([len(self.header), *(item.place.offset + item.place.nbytes for item in self.items)]) + self.tail


def shards(base: MergeBase, todo: Plan, dtype: str | None, metadata: Mapping[str, str]) -> list[Shard]:
    """The output's shards: those of the base, with the same tensors in the same order; added tensors go to the end of the last.

    With ``dtype`` a weight that the base stores quantized becomes one tensor of it, where the first of its parts was.
    """
    last = list(base.files)[-1]
    folds = sources(todo)
    built, seen = [], set[str]()
    for shard, file in base.files.items():
        items: dict[str, dict[str, Any]] = {}
        entries: list[_Entry] = []
        for stored, info in file.tensors.items():
            name = stored if dtype is None else base.part_owners.get(stored, (stored, ""))[0]
            recoded = dtype is not None and name in base.quantized
            if recoded and name in seen:
                continue
            seen.add(name)
            found = base.tensors[name] if recoded else info
            value, out = todo.whole.replaced.get(name), _output(found.dtype, dtype)
            entries.append((todo.whole.prefix + name, out, found.shape if value is None else value.shape))
            if value is not None:
                source: dict[str, Any] = {"value": value}
            elif name in folds:
                source = folds[name] | ({"source": info} if "written_with" in folds[name] else {})
            else:
                source = {"storage": base.storage(name, dtype)} if recoded or out != info.dtype else {"source": info}
            items[todo.whole.prefix + name] = source
        for name, copied in todo.copies.items():
            if copied in file.tensors or (dtype is not None and copied in base.quantized and shard == last):
                info = base.tensors[copied]
                out = _output(info.dtype, dtype)
                entries.append((name, out, info.shape))
                reader = base.storage(copied, dtype).reader
                items[name] = folds[name] if name in folds else (
                    {"source": info} if out == info.dtype and copied not in base.quantized
                    else {"storage": Storage(reader, PlainWriter(name, out))})
        if shard == last:
            for name, value in todo.whole.added.items():
                entries.append((name, _output(dtype_name(value.dtype), dtype), value.shape))
                items[name] = {"value": value, "added": True}
        start = min((info.offset for info in file.tensors.values()), default=8)
        kept = file.metadata if dtype is None or not base.quantized else {}  # it may tell how the parts of quantized weights are read
        header, places = _aligned(entries, {"format": "pt", **kept, **metadata}, start)
        built.append(Shard(shard, file, header, tuple(Item(place, **items[name]) for name, place in places.items())))
    return built


def sources(todo: Plan) -> dict[str, dict[str, Any]]:
    """Where the bytes of tensors come from that a fold writes, by the tensor's name in the base."""
    found: dict[str, dict[str, Any]] = {}
    for name, target in todo.targets.items():
        found[target.storage.main_tensor] = {"storage": target.storage, "target": target}
        found |= {other: {"written_with": name} for other in target.storage.companions}
        if target.bias is not None:
            found[target.bias] = {"written_with": name, "bias": True}
    return found


def index(base: Checkpoint, built: list[Shard]) -> dict[str, Any] | None:
    """The index of a sharded output, or None for a single file."""
    if base.index is None:
        return None
    total = sum(item.place.nbytes for shard in built for item in shard.items)
    metadata = {**base.index.get("metadata", {}), "total_size": total}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(int(np.prod(item.place.shape, dtype=object)) for shard in built for item in shard.items)
    return {"metadata": metadata, "weight_map": {item.place.name: shard.name for shard in built for item in shard.items}}


def _output(stored: str, asked: str | None) -> str:
    return asked if asked is not None and stored in FLOATS else stored


def _aligned(entries: list[_Entry], metadata: Mapping[str, str], start: int) -> tuple[bytes, dict[str, TensorInfo]]:
    """The plan in the given order, or with wide dtypes first where a change of dtype would misalign a tensor: readers map it in place.

    ``start`` is where the tensors begin in the file that this one is made from: here they begin at the same place of some page, so that a
    file system which can share pages between files shares those of unchanged tensors.
    """
    header, places = plan(entries, metadata, start)
    if any(place.offset % DTYPES[place.dtype].itemsize for place in places.values()):
        header, places = plan(sorted(entries, key=lambda entry: -DTYPES[entry[1]].itemsize), metadata, start)
    return header, places
