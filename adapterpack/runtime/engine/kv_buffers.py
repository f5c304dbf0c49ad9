"""Buffers ``[rows, heads, length, width]`` of keys or values, on the host or on a device, with access to
single rows.
"""

from __future__ import annotations

import math
import mmap
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from ...errors import ConfigError
from ..ort.values import HOST, array_of, element_type, empty, fill, value_of
from ..providers.resolved_device import ResolvedDevice

Shape = tuple[int, ...]


class Buffer(Protocol):
    """Memory that a graph reads and writes in place."""

    shape: Shape
    dtype: np.dtype[Any]

    @property
    def address(self) -> int:
        """The address of its first number."""
        ...

    def write(self, row: int, array: np.ndarray, start: int) -> None:
        """Writes ``[heads, positions, width]`` into a row, from the position ``start`` on."""
        ...

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """Returns a copy of the positions ``start`` to ``stop`` of a row, ``[heads, positions, width]``."""
        ...

    def move(self, source: int, target: int, length: int) -> None:
        """Copies at least the first ``length`` positions of a row to another row."""
        ...


class HostBuffer:
    """A buffer in host memory, which the system allocates page by page on first write. numpy would ask for
    huge pages, and a few positions in each row would then occupy the full buffer.

    Raises:
        ConfigError: there is no memory for it.
    """

    def __init__(self, shape: Shape, dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        try:
            memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        except (OSError, OverflowError, ValueError) as error:
            raise _no_memory(shape, dtype) from error
        self._array = np.frombuffer(memory, dtype).reshape(shape)

    @property
    def address(self) -> int:
        """The address of its first number."""
        return int(self._array.ctypes.data)

    def write(self, row: int, array: np.ndarray, start: int) -> None:
        """Writes positions into a row by a copy in numpy."""
        self._array[row, :, start : start + array.shape[1]] = array

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """Returns a copy of positions of a row."""
        return self._array[row, :, start:stop].copy()

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` positions of a row to another row."""
        self._array[target, :, :length] = self._array[source, :, :length]


class DeviceBuffer:
    """A buffer on a device. ONNX Runtime's Python API can copy complete values only, so rows are copied by
    graphs of a few nodes that run on the device.

    Raises:
        ConfigError: there is no memory for it.
    """

    def __init__(self, shape: Shape, dtype: np.dtype[Any], resolved: ResolvedDevice) -> None:
        self.shape, self.dtype, self._resolved = shape, dtype, resolved
        try:
            self._value = empty(shape, dtype, resolved.memory)
            fill(self._value, np.zeros(shape, dtype))
        except (RuntimeError, MemoryError) as error:
            raise _no_memory(shape, dtype) from error

    @property
    def address(self) -> int:
        """The address of its first number, on the device."""
        return int(self._value.data_ptr())

    def write(self, row: int, array: np.ndarray, start: int) -> None:
        """Writes positions into a row. The graph returns the complete row, with the block inserted, into the
        row's own memory.
        """
        stop = start + array.shape[1]
        binding = self._binding("put", row)
        block = value_of(np.ascontiguousarray(array.astype(self.dtype, copy=False)), self._resolved.memory)
        binding.bind_ortvalue_input("block", block)
        self._run("put", binding, row, start=start, stop=stop)

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """Returns a copy of positions of a row, in host memory."""
        binding, found = (
            self._binding("take", row),
            empty((self.shape[1], stop - start, self.shape[3]), self.dtype),
        )
        binding.bind_ortvalue_output("to", found)
        self._run("take", binding, None, start=start, stop=stop)
        return array_of(found).copy()  # the array only borrows the memory of the value

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a complete row to another row."""
        self._run("copy", self._binding("copy", source), target)

    def _binding(self, kind: str, row: int) -> Any:
        binding = _copier(kind, element_type(self.dtype), self._resolved).io_binding()
        binding.bind_input("from", *self._resolved.memory, *self._place(row))
        return binding

    def _run(self, kind: str, binding: Any, row: int | None, **places: int) -> None:
        values = {name: value_of(np.array([number], np.int64)) for name, number in places.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        if row is not None:
            binding.bind_output("to", *self._resolved.memory, *self._place(row))
        _copier(kind, element_type(self.dtype), self._resolved).run_with_iobinding(binding)

    def _place(self, row: int) -> tuple[Any, Shape, int]:
        shape = self.shape[1:]
        return element_type(self.dtype), shape, self.address + row * math.prod(shape) * self.dtype.itemsize


def buffer(shape: Shape, dtype: np.dtype[Any], resolved: ResolvedDevice) -> Buffer:
    """Allocates a buffer of zeros in the memory where the device keeps values between runs."""
    return HostBuffer(shape, dtype) if resolved.memory == HOST else DeviceBuffer(shape, dtype, resolved)


def _no_memory(shape: Shape, dtype: np.dtype[Any]) -> ConfigError:
    return ConfigError(
        "there is not enough memory for the keys and values of so many rows",
        found=f"{shape} {dtype} for one of a layer's two",
        remedy="open the engine with fewer max_rows or a smaller max_length",
    )


@lru_cache(maxsize=16)
def _copier(kind: str, dtype: Any, resolved: ResolvedDevice) -> ort.InferenceSession:
    """Returns a session with a graph that copies a row (``copy``), returns positions of it (``take``), or
    inserts a block into it (``put``).
    """
    import onnx_ir as ir  # noqa: PLC0415 - no session on the CPU needs it

    of = ir.TensorType(ir.DataType(dtype) if isinstance(dtype, int) else ir.DataType.from_numpy(dtype))
    whole = ir.Value(name="from", shape=ir.Shape(["heads", "length", "width"]), type=of)
    block = ir.Value(name="block", shape=ir.Shape(["heads", "positions", "width"]), type=of)
    start, stop = (
        ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
        for name in ("start", "stop")
    )
    axis = ir.node("Constant", [], {"value": ir.tensor(np.array([1], np.int64))})
    first = ir.node("Constant", [], {"value": ir.tensor(np.array([0], np.int64))})
    last = ir.node("Constant", [], {"value": ir.tensor(np.array([np.iinfo(np.int64).max], np.int64))})

    def piece(begin: Any, end: Any) -> Any:
        return ir.node("Slice", [whole, begin, end, axis.outputs[0]])

    if kind == "copy":
        inputs, nodes = [whole], [ir.node("Identity", [whole])]
    elif kind == "take":
        inputs, nodes = [whole, start, stop], [axis, piece(start, stop)]
    else:
        before, after = piece(first.outputs[0], start), piece(stop, last.outputs[0])
        joined = ir.node("Concat", [before.outputs[0], block, after.outputs[0]], {"axis": 1})
        inputs, nodes = [whole, start, stop, block], [axis, first, last, before, after, joined]
    to = nodes[-1].outputs[0]
    to.name, to.type, to.shape = (
        "to",
        of,
        ir.Shape(["heads", "positions" if kind == "take" else "length", "width"]),
    )
    model = ir.Model(ir.Graph(inputs, [to], nodes=nodes, opset_imports={"": 21}, name=kind), ir_version=10)
    # Their shapes vary with the block, which a captured graph does not permit.
    plain = resolved.without_capture()
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(),
        plain.session_options(),
        providers=list(plain.providers),
        enable_fallback=0,
    )
