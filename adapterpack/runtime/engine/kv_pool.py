"""The KV cache of all running rows, in fixed memory on the host or on a device; a row is an index."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import onnxruntime as ort

from ...bundle import PAST, growing_axis
from ...errors import ConfigError
from ..ort import HOST, TYPES, OrtModel, array_of, element_type, empty, fill, value_of
from ..providers import ResolvedDevice

Shape = tuple[int, ...]
Window = tuple[str, int, Any, Shape, int]
"""Consecutive rows of a buffer, as an ``IOBinding`` takes them: the device name and number of their memory,
their element type, their shape ``[rows, heads, length, width]`` and the address of their first number.
"""


class HostBuffer:
    """A buffer ``[rows, heads, length, width]`` in host memory, which the system allocates page by page on
    first write. numpy would ask for huge pages, and a few positions in each row would then occupy the full
    buffer.

    Raises:
        ConfigError: there is no memory for it.
    """

    def __init__(self, shape: Shape, dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        try:
            memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        except (OSError, OverflowError, ValueError) as error:
            raise _no_memory(shape, dtype) from error
        self._array = np.frombuffer(memory, dtype).reshape(shape)
        self.address = int(self._array.ctypes.data)
        """The address of its first number."""

    def write(self, row: int, array: np.ndarray, start: int) -> None:
        """Writes ``[heads, positions, width]`` into a row, from the position ``start`` on."""
        self._array[row, :, start : start + array.shape[1]] = array

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """Returns a copy of the positions ``start`` to ``stop`` of a row, ``[heads, positions, width]``."""
        return self._array[row, :, start:stop].copy()

    def move(self, source: int, target: int, length: int, rows: int = 1) -> None:
        """Copies at least the first ``length`` positions of ``rows`` rows to as many others."""
        self._array[target : target + rows, :, :length] = self._array[source : source + rows, :, :length]


class DeviceBuffer:
    """A buffer on a device, with the methods of :class:`HostBuffer`. ONNX Runtime's Python API can copy
    complete values only, so rows are copied by graphs of a few nodes that run on the device.

    Raises:
        ConfigError: there is no memory for it.
    """

    def __init__(self, shape: Shape, dtype: np.dtype, resolved: ResolvedDevice) -> None:
        self.shape, self.dtype, self._resolved = shape, dtype, resolved
        try:
            self._value = empty(shape, dtype, resolved.memory)
            fill(self._value, np.zeros(shape, dtype))
        except (RuntimeError, MemoryError) as error:
            raise _no_memory(shape, dtype) from error
        self.address = int(self._value.data_ptr())
        """The address of its first number, on the device."""

    def write(self, row: int, array: np.ndarray, start: int) -> None:
        """Writes positions into a row. The graph returns the complete row, with the block inserted, into the
        row's own memory.
        """
        block = value_of(np.ascontiguousarray(array.astype(self.dtype, copy=False)), self._resolved.memory)
        self._copy(row, start, start + array.shape[1], row, block)

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """Returns a copy of positions of a row, in host memory."""
        found = empty((self.shape[1], stop - start, self.shape[3]), self.dtype)
        self._copy(row, start, stop, found)
        return array_of(found).copy()  # the array only borrows the memory of the value

    def move(self, source: int, target: int, length: int, rows: int = 1) -> None:
        """Copies ``rows`` complete rows to as many others."""
        self._copy(source, 0, self.shape[2], target, rows=rows)

    def _copy(self, row: int, start: int, stop: int, target: Any, block: Any = None, rows: int = 1) -> None:
        """Copies positions of a row, or the complete row with a ``block`` in their place, into another row or
        an ``OrtValue``; or those of ``rows`` rows, whose heads follow each other.
        """
        copier = _copier(block is not None, element_type(self.dtype), self._resolved)
        binding = copier.io_binding()
        binding.bind_input("from", *self._place(row, rows))
        values = {name: value_of(np.array([at], np.int64)) for name, at in (("start", start), ("stop", stop))}
        if block is not None:
            values["block"] = block
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        if isinstance(target, int):
            binding.bind_output("to", *self._place(target, rows))
        else:
            binding.bind_ortvalue_output("to", target)
        copier.run_with_iobinding(binding)

    def _place(self, row: int, rows: int) -> Window:
        address = self.address + row * math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (rows * self.shape[1], *self.shape[2:])
        return *self._resolved.memory, element_type(self.dtype), shape, address


def buffer(shape: Shape, dtype: np.dtype, resolved: ResolvedDevice) -> HostBuffer | DeviceBuffer:
    """Allocates a buffer of zeros in the memory where the device keeps values between runs."""
    return HostBuffer(shape, dtype) if resolved.memory == HOST else DeviceBuffer(shape, dtype, resolved)


def _no_memory(shape: Shape, dtype: np.dtype) -> ConfigError:
    return ConfigError(
        "there is not enough memory for the keys and values of so many rows",
        found=f"{shape} {dtype} for one of a layer's two",
        remedy="open the engine with fewer max_rows or a smaller max_length",
    )


@lru_cache(maxsize=16)
def _copier(inserts: bool, dtype: Any, resolved: ResolvedDevice) -> ort.InferenceSession:
    """Returns a session whose graph returns the positions ``start`` to ``stop`` of a row, or ``inserts`` a
    block in their place.
    """
    import onnx_ir as ir  # noqa: PLC0415 - no session on the CPU needs it

    of = ir.TensorType(ir.DataType(dtype) if isinstance(dtype, int) else ir.DataType.from_numpy(dtype))
    row, block = (
        ir.Value(name=name, shape=ir.Shape(["heads", length, "width"]), type=of)
        for name, length in (("from", "length"), ("block", "positions"))
    )
    start, stop = (
        ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
        for name in ("start", "stop")
    )
    axis, first, last = (
        ir.node("Constant", [], {"value": ir.tensor(np.array([number], np.int64))})
        for number in (1, 0, np.iinfo(np.int64).max)
    )

    def piece(begin: Any, end: Any) -> Any:
        return ir.node("Slice", [row, begin, end, axis.outputs[0]])

    if inserts:
        before, after = piece(first.outputs[0], start), piece(stop, last.outputs[0])
        joined = ir.node("Concat", [before.outputs[0], block, after.outputs[0]], {"axis": 1})
        inputs, nodes = [row, start, stop, block], [axis, first, last, before, after, joined]
    else:
        inputs, nodes = [row, start, stop], [axis, piece(start, stop)]
    (to,) = nodes[-1].outputs
    to.name, to.type = "to", of
    model = ir.Model(ir.Graph(inputs, [to], nodes=nodes, opset_imports={"": 21}, name="copy"), ir_version=10)
    # Their shapes vary with the block, which a captured graph does not permit.
    plain = resolved.without_capture()
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(),
        plain.session_options(),
        providers=list(plain.providers),
        enable_fallback=0,
    )


class KVPool:
    """A buffer ``[rows, heads, length, head_dim]`` for the keys and one for the values of each layer that has
    them, allocated once. ``family`` is the prefix of the graph inputs that they feed.

    Rows occupy the beginning of the buffers without gaps, so the graph can read and write any range of rows
    in place. On the CPU the system provides memory when a position is first written.

    Raises:
        ConfigError: the memory is too small for so many rows of so many positions.
    """

    def __init__(self, graph: OrtModel, rows: int, length: int, family: str = PAST) -> None:
        self.rows, self.length, self.memory = rows, length, graph.memory
        self._buffers = {
            name: buffer(
                (rows, value.shape[1], length, value.shape[3]), np.dtype(TYPES[value.type]), graph.resolved
            )
            for name, value in graph.inputs.items()
            if name.startswith(family) and growing_axis(name, value.shape) is not None
        }

    def windows(self, first: int, rows: int) -> Iterator[tuple[str, Window]]:
        """Yields the memory of ``rows`` rows from ``first`` on, with the graph input that it feeds."""
        for name, one in self._buffers.items():
            address = one.address + first * math.prod(one.shape[1:]) * one.dtype.itemsize
            yield name, (*self.memory, element_type(one.dtype), (rows, *one.shape[1:]), address)

    def write(self, row: int, arrays: Sequence[np.ndarray], start: int = 0) -> None:
        """Writes keys and values ``[heads, positions, head_dim]`` into a row from the position ``start`` on;
        one array for each buffer, in their order.
        """
        for one, array in zip(self._buffers.values(), arrays, strict=True):
            one.write(row, array, start)

    def read(self, row: int, start: int, stop: int) -> list[np.ndarray]:
        """Returns copies of the positions ``start`` to ``stop`` of a row, one for each buffer."""
        return [one.read(row, start, stop) for one in self._buffers.values()]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` positions of a row to another row."""
        for one in self._buffers.values():
            one.move(source, target, length)
