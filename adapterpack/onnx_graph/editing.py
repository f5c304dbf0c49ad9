"""Finds values in ``onnx_ir`` graphs, adds constants and nodes under explicit names, and writes graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

Extent: TypeAlias = ir.SymbolicDim | int | str
"""An extent of a shape: a number, or the name of an axis of any length."""
PAGE = 4096
"""Every tensor begins at a multiple of this many bytes, so that it can be mapped alone and kernels read it in
place.
"""


def save_graph(model: ir.Model, path: Path, **options: Any) -> None:
    """Writes an ``onnx_ir`` model to ``path`` and its weights to ``path`` + ``.data``; passes ``options`` to
    ``onnx_ir.save``.

    Raises:
        OSError: the file system refuses.
    """
    ir.save(model, path, external_data=f"{path.name}.data", alignment=PAGE, align_threshold=0, **options)


def inputs_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """Returns the inputs of a graph by name."""
    return {value.name: value for value in graph.inputs}


def add_input(graph: ir.Graph, name: str, shape: Sequence[Extent], dtype: ir.DataType) -> ir.Value:
    """Adds an input after the others, and returns it."""
    value = ir.val(name, dtype, shape)
    graph.inputs.append(value)
    return value


def values_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """Returns every value that a node of the graph reads or computes, by name."""
    return {
        value.name: value for node in graph for value in (*node.inputs, *node.outputs) if value is not None
    }


def only_reader(value: ir.Value) -> ir.Node | None:
    """Returns the node that reads a value, if it is the only one."""
    uses = value.uses()
    return uses[0].node if len(uses) == 1 else None


def constant_input(node: ir.Node, place: int) -> np.ndarray | None:
    """Returns the numbers of an input of a node, if it has that input and the input is constant."""
    value = node.inputs[place] if place < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Adds a tensor to a graph as an initializer under the tensor's own name, and returns its value."""
    value = ir.val(tensor.name, const_value=tensor)
    graph.register_initializer(value)
    return value


def take_output(graph: ir.Graph, old: ir.Value, new: ir.Value, mark: str) -> None:
    """Makes ``new`` the output of a graph in place of ``old``, under the same name; ``old`` keeps it with a
    ``mark`` after it.
    """
    old.name, new.name = f"{old.name}{mark}", old.name
    graph.outputs[graph.outputs.index(old)] = new


def named_node(op: str, name: str, *inputs: ir.Value | None, **attributes: object) -> ir.Node:
    """Creates a node whose output has the node's name."""
    node = ir.node(op, list(inputs), attributes, name=name)
    node.outputs[0].name = f"{name}:0"
    return node


def part_of(
    tensor: ir.TensorProtocol,
    name: str,
    shape: tuple[int, ...],
    dtype: ir.DataType | None = None,
    at: int = 0,
) -> ir.TensorProtocol:
    """Returns a tensor on the bytes of another one, from byte ``at`` on; ``dtype`` is the same by default.
    Does not read the numbers of an external tensor.
    """
    kind = tensor.dtype if dtype is None else dtype
    extents = ir.Shape(shape)
    nbytes = -(-int(np.prod(shape)) * kind.bitwidth // 8)
    if isinstance(tensor, ir.ExternalTensor):
        place = (tensor.location, (tensor.offset or 0) + at, nbytes)
        return ir.ExternalTensor(*place, kind, shape=extents, name=name, base_dir=tensor.base_dir)
    raw = np.frombuffer(tensor.tobytes(), np.uint8, nbytes, at)
    if kind.bitwidth < 8:
        return ir.PackedTensor(raw, kind, shape=extents, name=name)
    return ir.tensor(raw.view(kind.numpy()).reshape(shape), kind, name=name)
