"""A graph's weights beside it: each has its place in the data file before the first byte is written, and goes there from where it lies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ...io.byte_ranges import opened, write_all

_INLINE = 256
"""Bytes up to which a tensor stays in the graph's own message."""
_ALIGN = 64
"""Where tensors begin: at multiples of what the widest vector registers load at once."""
_CHUNK = 8 << 20
"""Bytes that are brought into the order of the file at a time."""
_BAND = 64
"""Columns of a turned matrix that are copied at a time, so that what is read of it stays in the cache."""


class Weight(NamedTuple):
    """A tensor, which may be computed when it is asked for, and its place: ``nbytes`` at ``offset`` of ``file``, beside the graph."""

    tensor: Any
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in the file."""
        return int(self.tensor.nbytes)


def outlined(model: Any, file: str) -> list[Weight]:
    """Moves the initializers of ``model`` to places in ``file``, in the graph itself, and returns what is to be written there.

    Small ones go into the graph's own message, from wherever they lie; those that no value is known of stay as they are.
    """
    found: list[Weight] = []
    end = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes <= _INLINE:
                if isinstance(tensor, ir.ExternalTensor):  # its place is one of the file that it came from
                    value.const_value = ir.Tensor(tensor.numpy(), tensor.dtype, shape=tensor.shape, name=value.name)
                continue
            weight = Weight(tensor, file, -(-end // _ALIGN) * _ALIGN)
            end = weight.offset + weight.nbytes
            value.const_value = ir.ExternalTensor(file, weight.offset, weight.nbytes, tensor.dtype, shape=tensor.shape, name=value.name)
            found.append(weight)
    return found


def reserve(weights: list[Weight], folder: Path) -> None:
    """Every data file at its size; what was written into one before stays."""
    for file in {weight.file: None for weight in weights}:
        with opened(folder / file, os.O_WRONLY | os.O_CREAT) as sink:
            os.truncate(sink, max(weight.offset + weight.nbytes for weight in weights if weight.file == file))


def write(weight: Weight, folder: Path, tick: Callable[[int], None]) -> None:
    """Puts one tensor at its place, chunk by chunk; ``tick`` is told the bytes of each.

    Memory: what the tensor itself is computed in, and one chunk.
    """
    with opened(folder / weight.file, os.O_WRONLY) as sink:
        at = weight.offset
        for chunk in _chunks(weight.tensor):
            write_all(sink, chunk, at)
            at += chunk.nbytes
            tick(chunk.nbytes)
    if at != weight.offset + weight.nbytes:
        raise AssertionError(f"{weight.tensor.name} has {at - weight.offset} bytes and not {weight.nbytes}")


def _chunks(tensor: Any) -> Iterator[np.ndarray]:
    """The numbers of a tensor in the order of the file; a chunk is good until the next one is asked for."""
    if tensor.dtype.itemsize < 1:  # several numbers a byte
        yield np.frombuffer(tensor.tobytes(), np.uint8)
        return
    array = tensor.numpy()
    if array.flags.c_contiguous:
        whole = array.reshape(-1)
        step = max(1, _CHUNK // array.itemsize)
        yield from (whole[start : start + step] for start in range(0, whole.size, step))
        return
    rows = array.reshape(len(array), -1) if array.ndim != 2 else array
    step = max(1, _CHUNK // (rows.shape[1] * rows.itemsize))
    buffer = np.empty((min(step, len(rows)), rows.shape[1]), rows.dtype)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        chunk = buffer[: len(part)]
        for column in range(0, rows.shape[1], _BAND):
            chunk[:, column : column + _BAND] = part[:, column : column + _BAND]
        yield chunk
