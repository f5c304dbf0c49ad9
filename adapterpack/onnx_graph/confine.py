"""Checks a model before anything runs it: its external data must be in its own folder, and it must
terminate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FormatError, Unsupported
from ..library_errors import library_errors
from .graph_file import GraphFile, external_entries, nodes_of

if TYPE_CHECKING:
    import onnx

_EXTERNAL = 1
_LOOPS = frozenset({"Loop", "Scan", "SequenceMap"})
_WITHOUT_TENSORS = frozenset(
    {"OperatorSetIdProto", "StringStringEntryProto", "TensorAnnotation", "TypeProto", "ValueInfoProto"}
)
_MOST_NODES = 1 << 18
"""The most nodes of a model with its functions inlined."""
_MOST_NUMBERS = 1 << 26
"""The most numbers of a tensor that a node computes from constants alone, which ONNX Runtime does when it
opens the model.
"""
_MAKERS = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1}
"""Operator -> the index of the input that determines the size of its output."""


def require_safe(graph: GraphFile) -> set[Path]:
    """Checks the places of all external data of a model, without reading any, and that each of its nodes runs
    at most once.

    Returns:
        The files with the external data.

    Raises:
        FormatError: a location leads outside of the model's folder, or a file is missing; the model is larger
            than any, or its functions call each other in a circle.
        Unsupported: it has an operator that loops over a part of the model as often as its inputs say.

    Example:
        >>> require_safe(GraphFile("bundle/model.onnx"))  # doctest: +SKIP
    """
    model, path = graph.model, graph.path
    files = _external_files(graph)
    functions = {(function.domain, function.name): function for function in model.functions}
    for node in (
        *nodes_of(model.graph),
        *(node for function in functions.values() for node in nodes_of(function)),
    ):
        if node.op_type in _LOOPS and node.domain in ("", "ai.onnx"):
            raise Unsupported(
                "the graph repeats a part of itself as often as its inputs say, so nothing bounds how "
                "long it runs",
                where=path,
                found=f"{node.op_type} {node.name[:200]!r}",
                remedy="export the model without loops",
            )
    if _written_out(model.graph, functions, path) > _MOST_NODES:
        raise FormatError(
            "the graph has more nodes than any model", where=path, expected=f"at most {_MOST_NODES}"
        )
    _require_small(model.graph, path)
    return files


def _external_files(graph: GraphFile) -> set[Path]:
    files = set()
    for tensor in _tensors(graph.model):
        if tensor.data_location == _EXTERNAL:
            where = f"{graph.path}, tensor {tensor.name[:200]}"
            files.add(graph.external_file(external_entries(tensor, where), where))
    return files


def _tensors(message: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yields every TensorProto inside a message: initializers, attributes, subgraphs, functions, training
    information.
    """
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.name in _WITHOUT_TENSORS:
            continue
        for inner in value if field.is_repeated else (value,):
            if inner.DESCRIPTOR.name == "TensorProto":
                yield inner
            else:
                yield from _tensors(inner)


def _written_out(
    graph: onnx.GraphProto, functions: Mapping[tuple[str, str], onnx.FunctionProto], path: Path
) -> int:
    """Returns the number of nodes after every call of a function is inlined."""
    calling = set()

    @cache
    def size(key: tuple[str, str]) -> int:
        if key in calling:
            raise FormatError(
                "the graph's functions call each other without end", where=path, found=key[1][:200]
            )
        calling.add(key)
        total = count(functions[key])
        calling.discard(key)
        return total

    def count(body: onnx.GraphProto | onnx.FunctionProto) -> int:
        keys = [(node.domain, node.op_type) for node in nodes_of(body)]
        return len(keys) + sum(size(key) for key in keys if key in functions)

    return count(graph)


def _require_small(graph: onnx.GraphProto, path: Path) -> None:
    """Checks that the tensors that a model computes from constants fit into memory."""
    from onnx import numpy_helper  # noqa: PLC0415 - only what opens a graph pays for it

    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant" and node.output
        for attribute in node.attribute
        if attribute.name == "value"
    }
    for node in nodes_of(graph):
        place = _MAKERS.get(node.op_type, len(node.input))
        tensor = constants.get(node.input[place]) if place < len(node.input) else None
        if tensor is None or tensor.data_location == _EXTERNAL:
            continue
        with library_errors(
            "onnx", "a constant of the graph cannot be read", where=f"{path}, {tensor.name[:200]}"
        ):
            extents = [int(extent) for extent in numpy_helper.to_array(tensor).reshape(-1)]
        if math.prod(max(extent, 1) for extent in extents[:64]) > _MOST_NUMBERS:
            raise FormatError(
                "the graph makes a tensor that is too large for memory",
                where=f"{path}, {node.op_type} {node.name[:200]!r}",
                expected=f"at most {_MOST_NUMBERS} numbers",
                found=str(extents[:8]),
            )
