"""Reads the headers of GGUF files (versions 2 and 3, little-endian) strictly: every count is compared with
the bytes that exist, and no count alone allocates memory.

A header has magic, version and counts; then keys and values; then name, extents, type and offset of each
tensor. The aligned bytes of the tensors follow.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FormatError, Unsupported
from ...io import count_of
from . import MAGIC
from .tensor_types import TENSOR_TYPES, TensorType

ALIGNMENT = "general.alignment"
_MAX_KEYS = 4096
_MAX_TENSORS = 50_000
_MAX_TEXT = 1 << 20
_MAX_ITEMS = 1 << 20
_MAX_NAME = 512
_MAX_TEXTS, _MAX_TEXT_BYTES = 1 << 21, 16 << 20
"""Texts in all arrays together, and bytes of all other texts together."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, _ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    """One tensor: its shape in numpy's order (rows first), its type, and the position of its bytes in the
    file.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


class Array(NamedTuple):
    """An array in a header, which is checked but not read: nothing here needs a model's vocabulary."""

    kind: int
    items: int


class GGUFHeader(NamedTuple):
    """The contents of a header.

    ``spans`` maps a key to the byte range of the key and its value; ``tensors`` are in the order of their
    bytes, which begin at ``start``.
    """

    version: int
    values: Mapping[str, Any]
    spans: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, GGUFTensor]
    alignment: int
    start: int


class _Cursor:
    """A position in the bytes; reading past the end raises an error."""

    def __init__(self, data: bytes | mmap, where: Path) -> None:
        self.data = data
        self.where = where
        self.at = 0
        self.texts = self.text_bytes = 0

    def skip(self, count: int) -> None:
        """Moves on by ``count`` bytes."""
        if count > len(self.data) - self.at:
            raise FormatError(
                "the GGUF file is truncated, or a length in it is false",
                where=f"{self.where}, offset {self.at}",
                expected=f"{count} bytes",
                found=f"{len(self.data) - self.at} bytes",
            )
        self.at += count

    def take(self, count: int) -> bytes:
        """Returns the next ``count`` bytes."""
        self.skip(count)
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        """Returns the next number, of a ``struct`` format."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def count(self, limit: int, what: str) -> int:
        """Returns the next count, up to a limit."""
        value: int = self.number("Q")
        self.require(value, limit, what)
        return value

    def require(self, value: int, limit: int, what: str) -> None:
        """Raises if a count exceeds its limit."""
        if value > limit:
            raise FormatError(
                f"too many or too long: {what}",
                where=f"{self.where}, offset {self.at}",
                expected=f"at most {limit}",
                found=value,
            )

    def text(self, limit: int = _MAX_TEXT) -> str:
        """Returns the next string."""
        raw = self.take(self.count(limit, "text"))
        self.text_bytes += len(raw)
        self.require(self.text_bytes, _MAX_TEXT_BYTES, "all texts together")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                "text that is not UTF-8", where=f"{self.where}, offset {self.at}", found=repr(raw[:40])
            ) from error

    def value(self, kind: int) -> Any:
        """Returns the next value, of a GGUF type."""
        if kind == STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _ARRAY:
            return self.array(self.number("I"), self.count(_MAX_ITEMS, "an array"))
        raise FormatError("a value of an unknown type", where=f"{self.where}, offset {self.at}", found=kind)

    def array(self, kind: int, items: int) -> Array:
        """Skips the items of an array, checking that they exist."""
        if kind in _SCALARS:
            self.skip(items * struct.calcsize(_SCALARS[kind]))
        elif kind == STRING:
            self.texts += items
            self.require(self.texts, _MAX_TEXTS, "all arrays of texts together")
            for _ in range(items):
                self.skip(self.count(_MAX_TEXT, "text"))
        else:
            raise FormatError(
                "an array of values of an unknown type", where=f"{self.where}, offset {self.at}", found=kind
            )
        return Array(kind, items)


def read_header(data: bytes | mmap, where: Path) -> GGUFHeader:
    """Returns the header of a GGUF file whose bytes are ``data``.

    Raises:
        FormatError: the header is truncated, malformed, or exceeds a limit.
        Unsupported: the version, the byte order or a type of tensor is not supported.
    """
    cursor = _Cursor(data, where)
    magic = cursor.take(4)
    if magic != MAGIC:
        raise FormatError("this is not a GGUF file", where=where, expected="GGUF", found=repr(magic))
    version = cursor.number("I")
    if version not in (2, 3):
        raise Unsupported(
            "another version or byte order of GGUF",
            where=where,
            expected="version 2 or 3, little-endian",
            found=version,
        )
    count = cursor.count(_MAX_TENSORS, "tensors")
    keys = cursor.count(_MAX_KEYS, "keys")
    values = {}
    spans = {}
    for _ in range(keys):
        begin = cursor.at
        key = cursor.text(_MAX_NAME)
        if key in values:
            raise FormatError("a key stands twice", where=where, found=key)
        values[key] = cursor.value(cursor.number("I"))
        spans[key] = begin, cursor.at
    infos = {}
    for _ in range(count):
        info = _info(cursor)
        if info.name in infos:
            raise FormatError("a tensor name stands twice", where=where, found=info.name)
        infos[info.name] = info
    alignment = values.get(ALIGNMENT, 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise FormatError("an alignment must be a power of two", where=where, found=alignment)
    # The bytes of the tensors begin at the next aligned position after the header.
    start = align(cursor.at, alignment)
    tensors = {tensor.name: tensor for tensor in _place(infos.values(), start, alignment, len(data), where)}
    return GGUFHeader(version, values, spans, tensors, alignment, start)


def align(offset: int, alignment: int) -> int:
    """Returns the next multiple of an alignment.

    Example:
        >>> align(33, 32), align(64, 32)
        (64, 64)
    """
    return -(-offset // alignment) * alignment


def _info(cursor: _Cursor) -> GGUFTensor:
    """Reads the entry of one tensor, whose offset is relative to the first byte of all."""
    name = cursor.text(_MAX_NAME)
    rank = cursor.number("I")
    if not name or not 1 <= rank <= 4:
        raise FormatError(
            "a tensor must have a name and one to four dimensions",
            where=f"{cursor.where}, tensor {name}",
            found=rank,
        )
    shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in TENSOR_TYPES:
        raise Unsupported(
            "an unknown type of tensor",
            where=f"{cursor.where}, tensor {name}",
            found=f"type {kind}",
            expected=", ".join(supported.name for supported in TENSOR_TYPES.values()),
        )
    block = TENSOR_TYPES[kind]
    nbytes = count_of(shape, f"{cursor.where}, tensor {name}") // block.block * block.size
    return GGUFTensor(name, shape, block, offset, nbytes)


def _place(
    infos: Collection[GGUFTensor], start: int, alignment: int, size: int, where: Path
) -> Iterator[GGUFTensor]:
    """Yields the tensors at their places in the file; raises unless they follow one another, aligned and
    without overlap, up to the end of the file.
    """
    end = 0
    for info in sorted(infos, key=lambda info: info.offset):
        place = start + info.offset
        if (
            info.shape[-1] % info.type.block
            or info.offset != align(end, alignment)
            or place + info.nbytes > size
        ):
            raise FormatError(
                "a tensor does not lie where its neighbours end, or not in the file",
                where=f"{where}, tensor {info.name}",
                expected=f"offset {align(end, alignment)}, {info.nbytes} bytes in a file of {size}",
                found=info.offset,
            )
        end = info.offset + info.nbytes
        yield info._replace(offset=place)
    if infos and start + align(end, alignment) < size:
        raise FormatError(
            "bytes after the last tensor", where=where, expected=f"{start + end} bytes", found=size
        )


def text(value: str) -> bytes:
    """Returns a string as a header stores it: its length and its bytes."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key_text(key: str, value: str) -> bytes:
    """Returns a key with a string value as a header stores them."""
    return text(key) + struct.pack("<I", STRING) + text(value)


def tensor_info(name: str, shape: tuple[int, ...], number: int, offset: int) -> bytes:
    """Returns the entry of a tensor in a header; ``offset`` is relative to the first byte of all tensors."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, offset)
