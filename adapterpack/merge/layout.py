"""The shards of the output: which tensors each holds, in which order, and where each one's bytes come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..pack.safetensors import DTYPES, FLOATS, SafetensorsFile, TensorInfo, dtype_name, plan
from .codecs.view import Decoded, Matrix
from .plan import Plan, Target

_Entry = tuple[str, str, tuple[int, ...]]
CODES = "codes"
"""The role of the part that stands for its weight: every codec has it."""


@dataclass(frozen=True)
class Item:
    """One tensor of an output shard: its place, and where its bytes come from.

    Exactly one source: ``value`` (a module trained whole), or ``source`` (a tensor of the base, folded if ``target`` is set).
    ``bias_of`` marks a bias that is written together with the weight that it belongs to. ``coded`` is the quantized weight that a float
    tensor is decoded from; or, with ``role``, the one that this tensor is part of and that is written together with all of its parts.
    """

    place: TensorInfo
    source: TensorInfo | None = None
    target: Target | None = None
    value: np.ndarray | None = None
    added: bool = False
    bias_of: str | None = None
    coded: Matrix | None = None
    role: str | None = None

    @property
    def changed(self) -> bool:
        """Whether the tensor is one of the base whose numbers the merge changes."""
        return self.target is not None or self.bias_of is not None or (self.value is not None and not self.added)


@dataclass(frozen=True)
class Shard:
    """One output file, its header ready; ``base`` is the file that it is made from, ``items`` are in the order of their offsets."""

    name: str
    base: SafetensorsFile
    checkpoint: Decoded
    header: bytes
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """The bytes of the finished file."""
        return len(self.header) + sum(item.place.nbytes for item in self.items)


def shards(base: Decoded, todo: Plan, dtype: str | None, metadata: Mapping[str, str]) -> list[Shard]:
    """The output's shards: those of the base, with the same tensors in the same order; added tensors go to the end of the last.

    With ``dtype`` a weight that the base stores quantized becomes one tensor of it, where the first of its parts was.
    """
    biases = {target.bias: name for name, target in todo.targets.items() if target.bias is not None}
    last = list(base.files)[-1]
    built, plain = [], not base.coded
    decoded: set[str] = set()
    for shard, file in base.files.items():
        items: dict[str, dict[str, Any]] = {}
        entries: list[_Entry] = []
        for name, info in file.tensors.items():
            owner, role = base.parts_of.get(name, (None, ""))
            if owner is not None and dtype is None:
                entries.append((todo.whole.prefix + name, info.dtype, info.shape))
                items[todo.whole.prefix + name] = {"source": info} if owner not in todo.targets else {
                    "source": info, "coded": base.matrix(owner), "role": role, "target": todo.targets[owner] if role == CODES else None}
                continue
            if owner in decoded:
                continue
            if owner is not None:
                decoded.add(owner)
                name, info = owner, base.tensors[owner]  # noqa: PLW2901 - the tensor that its parts become
            value = todo.whole.replaced.get(name)
            entries.append((todo.whole.prefix + name, _output(info.dtype, dtype), info.shape if value is None else value.shape))
            items[todo.whole.prefix + name] = (
                {"value": value} if value is not None
                else {"target": todo.targets.get(name), "coded": base.matrix(owner)} if owner is not None
                else {"source": info, "target": todo.targets.get(name), "bias_of": biases.get(name)}
            )
        if shard == last:
            for name, value in todo.whole.added.items():
                entries.append((name, _output(dtype_name(value.dtype), dtype), value.shape))
                items[name] = {"value": value, "added": True}
        header, places = _aligned(entries, {"format": "pt", **(file.metadata if plain or dtype is None else {}), **metadata})
        built.append(Shard(shard, file, base, header, tuple(Item(place, **items[name]) for name, place in places.items())))
    return built


def index(base: Decoded, built: list[Shard]) -> dict[str, Any] | None:
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


def _aligned(entries: list[_Entry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, TensorInfo]]:
    """The plan in the given order, or with wide dtypes first where a change of dtype would misalign a tensor: readers map it in place."""
    header, places = plan(entries, metadata)
    if any(place.offset % DTYPES[place.dtype].itemsize for place in places.values()):
        header, places = plan(sorted(entries, key=lambda entry: -DTYPES[entry[1]].itemsize), metadata)
    return header, places
