"""Converts between numpy arrays and ``OrtValue``, also in bfloat16, which numpy lacks, and in
device memory.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

Memory = tuple[str, int]
"""The device name and number of a memory, as ``OrtValue`` takes them."""
HOST: Memory = ("cpu", 0)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ONNX_BFLOAT16 = 16


def element_type(dtype: np.dtype) -> Any:
    """Returns a dtype as an ``IOBinding`` takes it: numpy's dtype, or ONNX's number for bfloat16."""
    return _ONNX_BFLOAT16 if dtype == BFLOAT16 else dtype


def value_of(array: np.ndarray, memory: Memory = HOST) -> Any:
    """Wraps an array as an ``OrtValue``. On the host it borrows the array's memory and keeps it alive; on a
    device it is a copy.
    """
    array = np.ascontiguousarray(array) if array.ndim else array
    if memory == HOST and array.dtype == BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _ONNX_BFLOAT16)
    if array.dtype == BFLOAT16:
        value = empty(array.shape, array.dtype, memory)
        fill(value, array)
        return value
    return ort.OrtValue.ortvalue_from_numpy(array, *memory)


def empty(shape: tuple[int, ...], dtype: np.dtype, memory: Memory = HOST) -> Any:
    """Allocates an ``OrtValue`` with uninitialized memory of its own."""
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, element_type(np.dtype(dtype)), *memory)


def fill(value: Any, array: np.ndarray) -> None:
    """Overwrites a value in place with an array of the same shape and dtype."""
    value.update_inplace(array.view(np.uint16) if array.dtype == BFLOAT16 else array)


def array_of(value: Any) -> np.ndarray:
    """Returns the contents of a value: a copy from a device; on the host a view that is valid only while the
    value exists.
    """
    if value.element_type() != _ONNX_BFLOAT16:
        array: np.ndarray = value.numpy()
        return array
    if value.device_name() != "cpu":
        value = _on_host(value)
    shape = tuple(value.shape())
    numbers = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    numbers._value = value  # type: ignore[attr-defined]  # keeps the value alive as long as the array
    return np.frombuffer(numbers, BFLOAT16).reshape(shape)


def _on_host(value: Any) -> Any:
    """Copies a bfloat16 value from a GPU to the host through a graph, since ``OrtValue.numpy`` does not
    support the type.
    """
    copy = empty(tuple(value.shape()), BFLOAT16)
    binding = _identity(value.device_name()).io_binding()
    binding.bind_ortvalue_input("from", value)
    binding.bind_ortvalue_output("to", copy)
    _identity(value.device_name()).run_with_iobinding(binding)
    return copy


@cache
def _identity(memory: str) -> ort.InferenceSession:
    import onnx_ir as ir  # noqa: PLC0415 - no session on the CPU needs it

    kind = ir.TensorType(ir.DataType.BFLOAT16)
    node = ir.node("Identity", [ir.Value(name="from", type=kind)])
    node.outputs[0].name = "to"
    node.outputs[0].type = kind
    model = ir.Model(
        ir.Graph(list(node.inputs), node.outputs, nodes=[node], opset_imports={"": 21}, name="copy"),
        ir_version=10,
    )
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(),
        providers=[f"{memory.upper()}ExecutionProvider"],
        enable_fallback=0,
    )
