"""Walks the bytes of a serialized ONNX model without parsing weights, to find its initializers and to load
the model without them.

Encoding of protocol buffers: a message is a sequence of fields, each a varint key (number * 8 + wire type)
and its payload. ONNX, onnx.proto3: ModelProto.graph = 7, GraphProto.initializer = 5, TensorProto.float_data =
4, .name = 8, .raw_data = 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

from ..errors import FormatError, storage_errors
from ..io import open_regular, whole

_GRAPH, _INITIALIZER = 7, 5
_NAME = 8
_PAYLOADS = (9, 4)
_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5
KEPT = 1024
"""Payloads up to this size stay in the skeleton: shapes, axes and scalars."""


class _Field(NamedTuple):
    """One field of a message: its number, its wire type, the start of its key, and the start and end of its
    payload.
    """

    number: int
    wire: int
    key: int
    start: int
    stop: int


class Embedded(NamedTuple):
    """The place of an initializer's numbers inside the graph's own file, little-endian."""

    offset: int
    nbytes: int


_MOST_FIELDS = 1 << 19
"""The most fields of a file to visit one by one: fields of its initializers count, fields inside its nodes do
not.
"""
_MOST_BYTES = 128 << 20
"""The most bytes of a skeleton, the model without its weights."""


class _Bytes:
    """The mapped bytes of a model, and how many more fields may be visited."""

    def __init__(self, path: Path, data: bytes | mmap) -> None:
        self.path = path
        self.data = data
        self.left = _MOST_FIELDS

    def count(self, kept: int) -> None:
        """Counts one field, and looks at the bytes that were kept so far."""
        self.left -= 1
        if self.left < 0 or kept > _MOST_BYTES:
            raise FormatError(
                "the graph is too large",
                where=self.path,
                found="more fields, or more bytes without weights, than any model",
                expected=f"at most {_MOST_FIELDS} fields and {_MOST_BYTES} bytes",
            )


def walk(path: Path) -> tuple[bytes, dict[str, Embedded]]:
    """Returns the skeleton of the model at ``path``, which is the model without its large payloads as bytes
    that still parse, and the places of its initializers' numbers by name.

    Raises:
        FormatError: the file is not a serialized model.
        StorageError: it cannot be read.
    """
    with storage_errors(path), open_regular(path) as file, whole(file) as data:
        if not data:
            raise FormatError("the file is empty", where=path, expected="an ONNX model")
        source = _Bytes(path, data)
        skeleton = bytearray()
        embedded = dict[str, Embedded]()
        has_graph = False
        for field in _fields(source, 0, len(data)):
            if field.number == _GRAPH and field.wire == _BYTES:
                has_graph = True
                _put(skeleton, _GRAPH, _graph(source, field, embedded))
            else:
                source.count(len(skeleton) + field.stop - field.key)
                skeleton += data[field.key : field.stop]
        if not has_graph:
            raise FormatError(
                "the file holds no ONNX graph",
                where=path,
                remedy="name the .onnx file that an exporter wrote",
            )
        return bytes(skeleton), embedded


def _graph(source: _Bytes, graph: _Field, embedded: dict[str, Embedded]) -> bytes:
    out = bytearray()
    for field in _fields(source, graph.start, graph.stop):
        if field.number == _INITIALIZER and field.wire == _BYTES:
            _put(out, _INITIALIZER, _tensor(source, field, embedded))
        else:
            source.count(len(out) + field.stop - field.key)
            out += source.data[field.key : field.stop]
    return bytes(out)


def _tensor(source: _Bytes, tensor: _Field, embedded: dict[str, Embedded]) -> bytes:
    out = bytearray()
    name = ""
    payload = None
    data = source.data
    path = source.path
    for field in _fields(source, tensor.start, tensor.stop):
        source.count(len(out))
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


def _fields(source: _Bytes, start: int, stop: int) -> Iterator[_Field]:
    at = start
    data = source.data
    path = source.path
    while at < stop:
        key, begin = _varint(data, at, stop, path)
        number = key >> 3
        wire = key & 7
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
            raise FormatError(
                "the file is not an ONNX model", where=path, found=f"wire type {wire} at byte {at}"
            )
        if number == 0 or end > stop:
            raise FormatError(
                "the file is not an ONNX model, or it was cut",
                where=path,
                found=f"a field that ends at byte {end}",
                expected=f"at most {stop}",
            )
        yield _Field(number, wire, at, begin, end)
        at = end


def _varint(data: bytes | mmap, at: int, stop: int, path: Path) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise FormatError(
        "the file is not an ONNX model, or it was cut", where=path, found=f"no number at byte {at}"
    )


def _put(out: bytearray, number: int, payload: bytes) -> None:
    out += _encode_varint(number << 3 | _BYTES) + _encode_varint(len(payload)) + payload


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
