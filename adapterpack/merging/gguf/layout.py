"""Lays out the GGUF file that a merge writes: the base's keys, and the same tensors in the same order."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...base.codecs.row_order import as_file
from ...base.gguf import MAGIC
from ...base.gguf import header as gg
from ...base.gguf.tensor_types import TENSOR_TYPES, TYPE_NUMBERS, TensorType
from ...errors import ConfigError, Unsupported
from ...io import DTYPES, Json, TensorInfo
from ..checkpoint import Item, MergePlan, Shard, sources
from .base_model import GGUFBase, tensor_info

NAME = "model.gguf"
KEY = "adapterpack.merge"
"""The key under which the file states what it was merged from."""
_FILE_TYPE = "general.file_type"
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
"""llama.cpp's number for a file that is mostly of one type."""


def shards(base: GGUFBase, todo: MergePlan, dtype: str | None, note: str) -> list[Shard]:
    """Returns the only output file: every tensor in its own type, or every matrix in ``dtype``.

    Raises:
        Unsupported: a pack adds tensors, which is not supported, or changes a bias whose rows the file
            reorders.
        ConfigError: llama.cpp has no such type.
    """
    _require_no_additions(base, todo, dtype)
    header = base.file.header
    folds = sources(todo)
    infos = b""
    places = []
    end = 0
    for name, tensor in base.file.entries.items():
        kind = _type(tensor, dtype)
        place = tensor_info(name, tensor.shape, kind, gg.align(end, header.alignment))
        infos += gg.tensor_info(tensor.name, tensor.shape, TYPE_NUMBERS[kind.name], place.offset)
        end = place.offset + place.nbytes
        places.append(place)
    keys = [*_keys(base, dtype), gg.key_text(KEY, note)]
    head = MAGIC + struct.pack("<IQQ", header.version, len(places), len(keys)) + b"".join(keys) + infos
    head += bytes(gg.align(len(head), header.alignment) - len(head))
    items = tuple(
        _item(base, todo, place.name, place._replace(offset=len(head) + place.offset), folds)
        for place in places
    )
    return [Shard(NAME, base.file.path, head, items, gg.align(end, header.alignment) - end)]


def _require_no_additions(base: GGUFBase, todo: MergePlan, dtype: str | None) -> None:
    where = base.file.path
    full = todo.full_modules
    if full.added or todo.copies or full.vocab_size:
        raise Unsupported(
            "a pack brings modules or words that the file lacks, and none are added to it",
            where=where,
            found=", ".join(
                sorted([*full.added, *todo.copies, *(full.replaced if full.vocab_size else ())])[:5]
            ),
            remedy="merge into the original checkpoint, and convert the result with llama.cpp's converter",
        )
    if dtype is not None and dtype not in _FILE_TYPES:
        raise ConfigError(
            "llama.cpp has no such type of tensor",
            where="dtype",
            expected="float32, float16 or bfloat16",
            found=dtype,
        )
    for target in todo.targets.values():
        if target.bias is not None and base.row_order(target.bias) is not None:
            raise Unsupported(
                "the fold changes a bias whose rows are reordered in the file",
                where=f"{where}, {target.bias}",
                remedy=(
                    "merge into the original checkpoint, and convert the result with llama.cpp's converter"
                ),
            )


def _type(tensor: gg.GGUFTensor, dtype: str | None) -> TensorType:
    if dtype is None or len(tensor.shape) == 1 or (tensor.type.name[0] == "I" and tensor.type.plain):
        return tensor.type
    return TENSOR_TYPES[TYPE_NUMBERS[dtype]]


def _item(
    base: GGUFBase, todo: MergePlan, name: str, place: TensorInfo, folds: Mapping[str, Mapping[str, Any]]
) -> Item:
    info = base.file.tensors[name]
    value = todo.full_modules.replaced.get(name)
    if value is not None:
        order = base.row_order(name)
        return Item(place, value=_shape(value if order is None else as_file(value, order), place))
    if name in folds:
        source: Json = {"source": info} if "written_with" in folds[name] else {}
        return Item(place, **folds[name], **source)
    if place.dtype == info.dtype and place.shape == info.shape:
        return Item(place, source=info)
    return Item(place, storage=base.storage(name, place.dtype))


def _shape(value: np.ndarray, place: TensorInfo) -> np.ndarray:
    return value.astype(DTYPES[place.dtype]).reshape(place.shape)


def _keys(base: GGUFBase, dtype: str | None) -> list[bytes]:
    """Returns the keys and their values as bytes, with the file type of ``dtype`` and without the note of an
    earlier merge.
    """
    keys = []
    for key, (start, stop) in base.file.header.spans.items():
        raw = base.file.bytes[start:stop]
        if key == _FILE_TYPE and dtype is not None:
            raw = gg.text(key) + struct.pack("<II", 4, _FILE_TYPES[dtype])
        if key != KEY:
            keys.append(raw)
    return keys
