"""Reads ``.onnx_adapter`` files, which are FlatBuffers, strictly: checks every offset and length against the
size of the file.

Layout: offset of the root table, identifier ``TORT``; root table: format, adapter and model version, then a
vector of tables of (name, extents as int64, data type of ONNX, bytes).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..adapter_methods import Arrays
from ..errors import FormatError, Unsupported
from ..io import count_of
from .format import read_file

MAGIC = b"TORT"
VERSION = 1
_MAX_PARAMETERS = 50_000
_MAX_RANK = 8
_MAX_NAME = 512
_DTYPES: dict[int, Any] = {
    1: np.dtype("<f4"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
    16: np.dtype(ml_dtypes.bfloat16),
}
"""ONNX's numbers for the data types of adapters."""


class _Bytes:
    """The file's bytes; reading outside of them raises an error."""

    def __init__(self, data: bytes, where: Path) -> None:
        self.data, self.where = data, where

    def number(self, at: int, kind: str) -> int:
        size = struct.calcsize(kind)
        if at < 0 or at + size > len(self.data):
            raise FormatError(
                "the adapter's file is truncated, or an offset in it is false",
                where=f"{self.where}, offset {at}",
            )
        value: int = struct.unpack_from(f"<{kind}", self.data, at)[0]
        return value

    def field(self, table: int, index: int) -> int | None:
        """Returns the position of a table's field, or None if it has its default."""
        vtable = table - self.number(table, "i")
        entry = 4 + 2 * index
        offset = self.number(vtable + entry, "H") if entry + 2 <= self.number(vtable, "H") else 0
        return table + offset if offset else None

    def vector(self, place: int | None, size: int, limit: int, what: str) -> tuple[int, int]:
        """Returns the start of a vector of elements of ``size`` bytes, and their number."""
        if place is None:
            return 0, 0
        start = place + self.number(place, "I")
        count = self.number(start, "I")
        if count > limit or start + 4 + count * size > len(self.data):
            raise FormatError(
                f"too long: {what}",
                where=f"{self.where}, offset {start}",
                expected=f"at most {limit}, and within the file",
                found=count,
            )
        return start + 4, count


def read_parameters(path: Path) -> Arrays:
    """Returns the parameters of an ``.onnx_adapter`` by name, as read-only views of the bytes read.

    Raises:
        FormatError: malformed, or past a limit.
        Unsupported: another version of the format, or a data type in which no adapter is stored.
    """
    data = _Bytes(read_file(path), path)
    if data.data[4:8] != MAGIC:
        raise FormatError(
            "this is not an .onnx_adapter", where=path, expected=MAGIC, found=repr(data.data[4:8])
        )
    root = data.number(0, "I")
    place = data.field(root, 0)
    version = 0 if place is None else data.number(place, "i")
    if version != VERSION:
        raise Unsupported(
            "another version of the .onnx_adapter format", where=path, expected=VERSION, found=version
        )
    start, count = data.vector(data.field(root, 3), 4, _MAX_PARAMETERS, "parameters")
    parameters = {}
    total = 0
    for entry in range(start, start + 4 * count, 4):
        name, value = _parameter(data, entry + data.number(entry, "I"))
        if name in parameters:
            raise FormatError("a parameter stands twice", where=path, found=name)
        total += value.nbytes
        if total > len(data.data):
            raise FormatError("parameters lie over each other", where=path, found=name)
        parameters[name] = value
    return parameters


def _parameter(data: _Bytes, table: int) -> tuple[str, np.ndarray]:
    start, length = data.vector(data.field(table, 0), 1, _MAX_NAME, "a name")
    try:
        name = data.data[start : start + length].decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            "a name that is not UTF-8", where=data.where, found=repr(data.data[start : start + 40])
        ) from error
    place = data.field(table, 2)
    kind = 0 if place is None else data.number(place, "i")
    if kind not in _DTYPES:
        raise Unsupported(
            "a data type in which no adapter is stored",
            where=f"{data.where}, {name}",
            found=f"type {kind} of ONNX",
            expected=", ".join(str(dtype) for dtype in _DTYPES.values()),
        )
    at, rank = data.vector(data.field(table, 1), 8, _MAX_RANK, "a shape")
    shape = tuple(data.number(at + 8 * axis, "q") for axis in range(rank))
    begin, nbytes = data.vector(data.field(table, 3), 1, len(data.data), "a parameter's bytes")
    expected = (
        -1 if min(shape, default=0) < 0 else _DTYPES[kind].itemsize * count_of(shape, f"{data.where}, {name}")
    )
    if nbytes != expected:
        raise FormatError(
            "the shape of a parameter does not fit its bytes",
            where=f"{data.where}, {name}",
            found=nbytes,
            expected=f"{expected} bytes for {shape}",
        )
    return name, np.frombuffer(memoryview(data.data)[begin : begin + nbytes], _DTYPES[kind]).reshape(shape)
