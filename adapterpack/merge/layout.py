"""The shards of the output: which tensors each holds, in which order, and where each one's bytes come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..pack.checkpoint import Checkpoint
from ..pack.safetensors import DTYPES, FLOATS, SafetensorsFile, TensorInfo, dtype_name, plan
from .plan import Plan, Target

_Entry = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Item:
    """One tensor of an output shard: its place, and where its bytes come from.

    Exactly one source: ``value`` (a module trained whole), or ``source`` (a tensor of the base, folded if ``target`` is set).
    ``written_with`` names the weight with which this tensor changes and is written: that of a bias, or of scales.
    """

    place: TensorInfo
    source: TensorInfo | None = None
    target: Target | None = None
    value: np.ndarray | None = None
    added: bool = False
    written_with: str | None = None

    @property
    def changed(self) -> bool:
        """Whether the tensor is one of the base whose numbers the merge changes."""
        return self.target is not None or self.written_with is not None or (self.value is not None and not self.added)


@dataclass(frozen=True)
class Shard:
    """One output file, its header ready; ``base`` is the file that it is made from, ``items`` are in the order of their offsets."""

    name: str
    base: SafetensorsFile
    header: bytes
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """The bytes of the finished file."""
        return len(self.header) + sum(item.place.nbytes for item in self.items)


def shards(base: Checkpoint, todo: Plan, dtype: str | None, metadata: Mapping[str, str]) -> list[Shard]:
    """The output's shards: those of the base, with the same tensors in the same order; added tensors go to the end of the last."""
    beside = {other: name for name, target in todo.targets.items()
              for other in (target.bias, *target.codec.companions) if other is not None}
    last = list(base.files)[-1]
    built = []
    for shard, file in base.files.items():
        items: dict[str, dict[str, Any]] = {}
        entries: list[_Entry] = []
        for name, info in file.tensors.items():
            value = todo.whole.replaced.get(name)
            entries.append((todo.whole.prefix + name, _output(info.dtype, dtype), info.shape if value is None else value.shape))
            items[todo.whole.prefix + name] = (
                {"source": info, "target": todo.targets.get(name), "written_with": beside.get(name)} if value is None else {"value": value}
            )
        if shard == last:
            for name, value in todo.whole.added.items():
                entries.append((name, _output(dtype_name(value.dtype), dtype), value.shape))
                items[name] = {"value": value, "added": True}
        start = min((info.offset for info in file.tensors.values()), default=8)
        header, places = _aligned(entries, {"format": "pt", **file.metadata, **metadata}, start)
        built.append(Shard(shard, file, header, tuple(Item(place, **items[name]) for name, place in places.items())))
    return built


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
