"""A strict reader of GGUF (version 2 and 3, little-endian): every count is compared with the bytes that are there before it is believed.

Header: magic, version, counts; then keys and values; then name, extents, type and offset of each tensor; then the aligned bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import FormatError, Unsupported
from ..pack.safetensors import count_of
from .format import whole_file

MAGIC = b"GGUF"
_MAX_KEYS, _MAX_TENSORS, _MAX_TEXT, _MAX_ITEMS, _MAX_NAME = 4096, 50_000, 1 << 20, 1 << 20, 512
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Type(NamedTuple):
    """A tensor type: ``block`` values lie in ``size`` bytes, and ``decode`` makes an array of them."""

    name: str
    block: int
    size: int
    decode: Callable[[memoryview], np.ndarray]


def _plain(dtype: Any) -> Callable[[memoryview], np.ndarray]:
    return lambda data: np.frombuffer(data, dtype)


def _q8_0(data: memoryview) -> np.ndarray:
    """32 values a block: a float16 scale and 32 signed bytes; the product is float32."""
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("values", "i1", 32)]))
    values: np.ndarray = (blocks["scale"].astype(np.float32)[:, None] * blocks["values"].astype(np.float32)).reshape(-1)
    return values


TYPES = {0: _Type("F32", 1, 4, _plain("<f4")), 1: _Type("F16", 1, 2, _plain("<f2")), 8: _Type("Q8_0", 32, 34, _q8_0),
         28: _Type("F64", 1, 8, _plain("<f8")), 30: _Type("BF16", 1, 2, _plain(ml_dtypes.bfloat16))}
"""Number in the file -> what it means. Others are refused: adapters are not stored in them."""


class GGUFFile(NamedTuple):
    """What a file holds: values by key, tensors by name (numpy order of extents), and the type each was stored in."""

    values: dict[str, Any]
    tensors: dict[str, np.ndarray]
    types: dict[str, str]


class _Cursor:
    """A place in the bytes; taking more than there is says that the file is truncated."""

    def __init__(self, data: bytes, where: Path) -> None:
        self.data, self.where, self.at = data, where, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise FormatError("the GGUF file is truncated, or a length in it is false", where=f"{self.where}, offset {self.at}",
                              expected=f"{count} bytes", found=f"{len(self.data) - self.at} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def count(self, limit: int, what: str) -> int:
        value: int = self.number("Q")
        if value > limit:
            raise FormatError(f"too many or too long: {what}", where=f"{self.where}, offset {self.at}", expected=f"at most {limit}",
                              found=value)
        return value

    def text(self, limit: int = _MAX_TEXT) -> str:
        raw = self.take(self.count(limit, "text"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError("text that is not UTF-8", where=f"{self.where}, offset {self.at}", found=repr(raw[:40])) from error

    def value(self, kind: int, nested: bool = False) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _ARRAY and not nested:
            inner, items = self.number("I"), self.count(_MAX_ITEMS, "an array")
            return [self.value(inner, nested=True) for _ in range(items)]
        raise FormatError("a value of an unknown type", where=f"{self.where}, offset {self.at}", found=kind)


def read_gguf(path: Path) -> GGUFFile:
    """Keys and tensors of a GGUF file.

    Raises:
        FormatError: truncated, malformed, or past a limit.
        Unsupported: another version, another byte order, or a tensor type in which no adapter is stored.
    """
    data = whole_file(path)
    cursor = _Cursor(data, path)
    if cursor.take(4) != MAGIC:
        raise FormatError("this is not a GGUF file", where=path, expected="GGUF", found=repr(data[:4]))
    version = cursor.number("I")
    if version not in (2, 3):
        raise Unsupported("another version or byte order of GGUF", where=path, expected="version 2 or 3, little-endian", found=version)
    tensors, keys = cursor.count(_MAX_TENSORS, "tensors"), cursor.count(_MAX_KEYS, "keys")
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text(_MAX_NAME)
        if key in values:
            raise FormatError("a key stands twice", where=path, found=key)
        values[key] = cursor.value(cursor.number("I"))
    infos: dict[str, tuple[tuple[int, ...], _Type, int]] = {}
    for _ in range(tensors):
        name, info = _info(cursor)
        if name in infos:
            raise FormatError("a tensor name stands twice", where=path, found=name)
        infos[name] = info
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise FormatError("an alignment must be a power of two", where=path, found=alignment)
    start = -(-cursor.at // alignment) * alignment
    return GGUFFile(values, _tensors(data, infos, start, alignment, path), {name: kind.name for name, (_, kind, _) in infos.items()})


def _info(cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], _Type, int]]:
    name, rank = cursor.text(_MAX_NAME), cursor.number("I")
    if not name or not 1 <= rank <= 4:
        raise FormatError("a tensor must have a name and one to four dimensions", where=f"{cursor.where}, tensor {name}", found=rank)
    shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in TYPES:
        raise Unsupported("a tensor type that adapters are not stored in", where=f"{cursor.where}, tensor {name}", found=f"type {kind}",
                          expected=", ".join(known.name for known in TYPES.values()), remedy="convert the adapter again with --outtype f32")
    return name, (shape, TYPES[kind], offset)


def _tensors(
    data: bytes, infos: dict[str, tuple[tuple[int, ...], _Type, int]], start: int, alignment: int, where: Path
) -> dict[str, np.ndarray]:
    """The tensors, which must lie in the file one after another, aligned, none over another, with nothing after the last."""
    found, end = {}, 0
    for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        nbytes = count_of(shape, f"{where}, tensor {name}") // kind.block * kind.size
        if shape[-1] % kind.block or offset != -(-end // alignment) * alignment or start + offset + nbytes > len(data):
            raise FormatError("a tensor does not lie where its neighbours end, or not in the file", where=f"{where}, tensor {name}",
                              expected=f"offset {-(-end // alignment) * alignment}, {nbytes} bytes in a file of {len(data)}", found=offset)
        end = offset + nbytes
        found[name] = kind.decode(memoryview(data)[start + offset : start + end]).reshape(shape)
    if infos and start + -(-end // alignment) * alignment < len(data):
        raise FormatError("bytes after the last tensor", where=where, expected=f"{start + end} bytes", found=len(data))
    return found
