"""The keys and values of all running rows in fixed memory; a row is an index."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from ...bundle.manifest import PAST
from ...errors import ConfigError
from ..ort_model import TYPES, OrtModel
from ..providers.starting import Started


class Window(NamedTuple):
    """Consecutive rows of one buffer: the address of their first number, and their shape ``[rows, heads, length, head_dim]``."""

    address: int
    shape: tuple[int, ...]


class KVPool:
    """A buffer ``[rows, heads, length, head_dim]`` for the keys and one for the values of each layer, allocated once. ``family`` is what
    the names of the graph's inputs for them begin with.

    Rows lie at the beginning of their buffers, so the graph reads and writes any run of consecutive rows where they are. Memory of the CPU
    is taken from the system when a position is first written.

    Raises:
        ConfigError: there is no memory for so many rows of so many positions.
    """

    def __init__(self, graph: OrtModel, rows: int, length: int, family: str = PAST) -> None:
        self.rows, self.length, self.memory = rows, length, graph.memory
        self._buffers: dict[str, tuple[Any, np.dtype[Any]]] = {}
        for name, value in graph.inputs.items():
            if name.startswith(family):
                dtype = np.dtype(TYPES[value.type])
                shape = (rows, value.shape[1], length, value.shape[3])
                buffer: Any = _zeros(shape, dtype)
                if self.memory[0] != "cpu":
                    buffer = ort.OrtValue.ortvalue_from_numpy(buffer, *self.memory)
                self._buffers[name] = buffer, dtype
        self._mover = None if self.memory[0] == "cpu" else _Mover(graph)

    @property
    def nbytes(self) -> int:
        """The size of all buffers in bytes."""
        return sum(int(np.prod(self._shape(name))) * dtype.itemsize for name, (_, dtype) in self._buffers.items())

    def dtype(self, name: str) -> np.dtype[Any]:
        """The float type of a buffer."""
        return self._buffers[name][1]

    def windows(self, first: int, rows: int) -> Iterator[tuple[str, Window]]:
        """The memory of ``rows`` rows from ``first``, by the graph's input."""
        for name, (_, dtype) in self._buffers.items():
            shape = self._shape(name)
            yield name, Window(self._address(name) + first * int(np.prod(shape[1:])) * dtype.itemsize, (rows, *shape[1:]))

    def write(self, row: int, arrays: Sequence[np.ndarray], start: int = 0) -> None:
        """Puts keys and values ``[heads, positions, head_dim]``, one array a buffer in their order, into a row from a position on."""
        for (name, (buffer, _)), array in zip(self._buffers.items(), arrays, strict=True):
            if isinstance(buffer, np.ndarray):
                buffer[row, :, start : start + array.shape[1]] = array
            else:
                whole = buffer.numpy()[row]
                whole[:, start : start + array.shape[1]] = array
                self._copy(name, ort.OrtValue.ortvalue_from_numpy(whole, *self.memory).data_ptr(), row)

    def read(self, row: int, start: int, stop: int) -> list[np.ndarray]:
        """A copy of positions of a row, as :meth:`write` takes it."""
        return [(buffer if isinstance(buffer, np.ndarray) else buffer.numpy())[row, :, start:stop].copy()
                for buffer, _ in self._buffers.values()]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` positions of one row to another."""
        for name, (buffer, dtype) in self._buffers.items():
            if isinstance(buffer, np.ndarray):
                buffer[target, :, :length] = buffer[source, :, :length]
            else:
                self._copy(name, self._address(name) + source * int(np.prod(self._shape(name)[1:])) * dtype.itemsize, target)

    def _copy(self, name: str, address: int, row: int) -> None:
        assert self._mover is not None
        shape, dtype = self._shape(name)[1:], self.dtype(name)
        self._mover.copy(address, self._address(name) + row * int(np.prod(shape)) * dtype.itemsize, shape, dtype)

    def _shape(self, name: str) -> tuple[int, ...]:
        buffer = self._buffers[name][0]
        return tuple(buffer.shape if isinstance(buffer, np.ndarray) else buffer.shape())

    def _address(self, name: str) -> int:
        buffer = self._buffers[name][0]
        return int(buffer.ctypes.data if isinstance(buffer, np.ndarray) else buffer.data_ptr())


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros that take memory a page at a time. numpy asks for huge pages, and a few positions of each row would take all of them."""
    try:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError("there is no memory for the keys and values of so many rows", found=f"{shape} {dtype} for one of a layer's two",
                          remedy="open the engine with fewer max_rows or a smaller max_length") from error
    return np.frombuffer(memory, dtype).reshape(shape)


class _Mover:
    """Copies memory of a device to memory of the same device, by a graph of one node: ONNX Runtime has no other way in Python."""

    def __init__(self, graph: OrtModel) -> None:
        self._like = graph
        self._graphs: dict[Any, ort.InferenceSession] = {}

    def copy(self, source: int, target: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Copies ``shape`` numbers between two addresses."""
        graph = self._graphs.get(dtype)
        if graph is None:
            graph = self._graphs[dtype] = _identity(dtype, self._like.started)
        binding = graph.io_binding()
        binding.bind_input("from", *self._like.memory, dtype, shape, source)
        binding.bind_output("to", *self._like.memory, dtype, shape, target)
        graph.run_with_iobinding(binding)


def _identity(dtype: np.dtype[Any], started: Started) -> ort.InferenceSession:
    import onnx_ir as ir  # noqa: PLC0415 - no CPU session needs it

    kind = ir.TensorType(ir.DataType.from_numpy(dtype))
    value = ir.Value(name="from", shape=ir.Shape(["heads", "length", "width"]), type=kind)
    node = ir.node("Identity", [value])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "to", kind, value.shape
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 21}, name="copy"), ir_version=10)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), started.session_options(), providers=list(started.providers))
