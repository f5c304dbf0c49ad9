"""Walks the bytes of a serialized ONNX model without parsing weights, to find its initializers and to load the model without them.

Encoding of protocol buffers: a message is a sequence of fields, each a varint key (number * 8 + wire type) and its payload.
ONNX, onnx.proto3: ModelProto.graph = 7, GraphProto.initializer = 5, TensorProto.float_data = 4, .name = 8, .raw_data = 9.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import FormatError, storage_errors

_GRAPH, _INITIALIZER = 7, 5
_NAME, _PAYLOADS = 8, (9, 4)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
KEPT = 1024
"""Payloads up to this size stay in the skeleton: shapes, axes and scalars."""


class Field(NamedTuple):
    """One field of a message: its number, its wire type, where its key begins, and where its payload begins and ends."""

    number: int
    wire: int
    key: int
    start: int
    stop: int


class Embedded(NamedTuple):
    """The place of an initializer's numbers inside the graph's own file, little-endian."""

    offset: int
    nbytes: int


class Walked(NamedTuple):
    """A model without its large payloads, as bytes that parse, and where these payloads are, by the initializer's name."""

    skeleton: bytes
    embedded: dict[str, Embedded]


Buffer = bytes | mmap.mmap


def walk(path: Path) -> Walked:
    """The skeleton of the model at ``path`` and the places of its initializers' numbers.

    Raises:
        FormatError: the file is not a serialized model.
        StorageError: it cannot be read.
    """
    with storage_errors(path), path.open("rb") as file, _mapped(file.fileno(), path) as data:
        skeleton, embedded = bytearray(), dict[str, Embedded]()
        has_graph = False
        for field in _fields(data, 0, len(data), path):
            if field.number == _GRAPH and field.wire == _BYTES:
                has_graph = True
                _put(skeleton, _GRAPH, _graph(data, field, embedded, path))
            else:
                skeleton += data[field.key : field.stop]
        if not has_graph:
            raise FormatError("the file holds no ONNX graph", where=path, remedy="name the .onnx file that an exporter wrote")
        return Walked(bytes(skeleton), embedded)


def _mapped(descriptor: int, path: Path) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file
        raise FormatError("the file is empty", where=path, expected="an ONNX model") from None


def _graph(data: Buffer, graph: Field, embedded: dict[str, Embedded], path: Path) -> bytes:
    out = bytearray()
    for field in _fields(data, graph.start, graph.stop, path):
        if field.number == _INITIALIZER and field.wire == _BYTES:
            _put(out, _INITIALIZER, _tensor(data, field, embedded, path))
        else:
            out += data[field.key : field.stop]
    return bytes(out)


def _tensor(data: Buffer, tensor: Field, embedded: dict[str, Embedded], path: Path) -> bytes:
    out, name, payload = bytearray(), "", None
    for field in _fields(data, tensor.start, tensor.stop, path):
        if field.wire == _BYTES and field.number in _PAYLOADS:
            if payload is not None:
                raise FormatError("an initializer holds its numbers twice", where=path)
            payload = field
            if field.stop - field.start <= KEPT:
                out += data[field.key : field.stop]
            continue
        if field.wire == _BYTES and field.number == _NAME:
            name = bytes(data[field.start : field.stop]).decode("utf-8", "replace")
        out += data[field.key : field.stop]
    if payload is not None:
        if name in embedded:
            raise FormatError("two initializers have the same name", where=path, found=name)
        embedded[name] = Embedded(payload.start, payload.stop - payload.start)
    return bytes(out)


def _fields(data: Buffer, start: int, stop: int, path: Path) -> Iterator[Field]:
    at = start
    while at < stop:
        key, begin = _varint(data, at, stop, path)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            end = _varint(data, begin, stop, path)[1]
        elif wire == _FIXED64:
            end = begin + 8
        elif wire == _FIXED32:
            end = begin + 4
        elif wire == _BYTES:
            length, begin = _varint(data, begin, stop, path)
            end = begin + length
        else:
            raise FormatError("the file is not an ONNX model", where=path, found=f"wire type {wire} at byte {at}")
        if number == 0 or end > stop:
            raise FormatError("the file is not an ONNX model, or it was cut", where=path, found=f"a field that ends at byte {end}",
                              expected=f"at most {stop}")
        yield Field(number, wire, at, begin, end)
        at = end


def _varint(data: Buffer, at: int, stop: int, path: Path) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise FormatError("the file is not an ONNX model, or it was cut", where=path, found=f"no number at byte {at}")


def _put(out: bytearray, number: int, payload: bytes) -> None:
    out += _encoded(number << 3 | _BYTES) + _encoded(len(payload)) + payload


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
