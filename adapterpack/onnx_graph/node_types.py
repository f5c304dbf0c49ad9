"""Infers the types of a graph's nodes: the version of each node's operator, and the types bound to its type
parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from .graph_file import nodes_of, subgraphs_of

if TYPE_CHECKING:
    import onnx

_ONNX = ("", "ai.onnx")


class _Schema(NamedTuple):
    """A version of an operator, with the ``allowed`` types of each type parameter. ``inputs`` and ``outputs``
    are ONNX Runtime's own: each has a ``name``, and as ``typeStr`` its type parameter or its type.
    """

    since: int
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    allowed: Mapping[str, Sequence[str]]


class TypedNode(NamedTuple):
    """A node: ``since`` is the version of its operator, None if ONNX Runtime does not know the operator;
    ``types`` maps the operator's type parameters, and the formal names of its inputs and outputs, to the
    types that are known.
    """

    name: str
    domain: str
    operator: str
    since: int | None
    types: Mapping[str, str]

    @property
    def of(self) -> str:
        """The operator's name, with its domain unless that is ONNX's."""
        return f"{self.domain}.{self.operator}" if self.domain else self.operator


def value_types(model: onnx.ModelProto) -> Mapping[str, str]:
    """Returns the types of a model's values by name."""
    known: dict[str, str] = {}
    for _ in _infer_types(model, known):
        pass
    return known


def typed_nodes(model: onnx.ModelProto) -> Iterator[TypedNode]:
    """Yields the nodes of a model's proto in order, including those of subgraphs."""
    return _infer_types(model, {})


def _infer_types(model: onnx.ModelProto, known: dict[str, str]) -> Iterator[TypedNode]:
    import onnx  # noqa: PLC0415 - only what looks into a graph pays for it

    versions = {_domain(entry.domain): entry.version for entry in model.opset_import}
    for graph in _graphs(model.graph):
        known.update({tensor.name: _tensor(onnx, tensor.data_type) for tensor in graph.initializer})
        for value in (*graph.input, *graph.value_info, *graph.output):
            if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type:
                known[value.name] = _tensor(onnx, value.type.tensor_type.elem_type)
    for node in nodes_of(model.graph):
        domain = _domain(node.domain)
        schema = _schema(domain, node.op_type, versions.get(domain, 1))
        types: dict[str, str] = {}
        if schema is not None:
            _bind(types, schema.inputs, node.input, known)
            _bind(types, schema.outputs, node.output, known)
            for name, formal in zip(node.output, _formals(schema.outputs, len(node.output)), strict=True):
                kind = (
                    known.get(name)
                    or types.get(formal.typeStr)
                    or (formal.typeStr if formal.typeStr.startswith("tensor(") else None)
                    or _type_by_attribute(onnx, node, schema, formal.typeStr)
                )
                if name and kind:
                    known[name] = kind
            _bind(types, schema.outputs, node.output, known)
        yield TypedNode(node.name, domain, node.op_type, None if schema is None else schema.since, types)


def _domain(name: str) -> str:
    return "" if name in _ONNX else name


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for inner in (inner for node in graph.node for inner in subgraphs_of(node)):
        yield from _graphs(inner)


@cache
def _schemas() -> Mapping[tuple[str, str], Sequence[Any]]:
    """Returns the versions of every operator that the installed ONNX Runtime knows, the newest first."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime  # noqa: PLC0415 - as above

    found: dict[tuple[str, str], list[Any]] = {}
    for schema in runtime.get_all_operator_schema():
        found.setdefault((_domain(schema.domain), schema.name), []).append(schema)
    return {
        key: sorted(versions, key=lambda schema: -schema.since_version) for key, versions in found.items()
    }


@cache
def _schema(domain: str, operator: str, version: int) -> _Schema | None:
    for schema in _schemas().get((domain, operator), ()):
        if schema.since_version <= version:
            allowed = {one.type_param_str: tuple(one.allowed_type_strs) for one in schema.type_constraints}
            return _Schema(schema.since_version, schema.inputs, schema.outputs, allowed)
    return None


def _formals(formals: Sequence[Any], count: int) -> list[Any]:
    """Returns one formal for each value: the last formal may be variadic."""
    return [formals[min(place, len(formals) - 1)] for place in range(count)] if formals else []


def _bind(
    types: dict[str, str], formals: Sequence[Any], names: Sequence[str], known: Mapping[str, str]
) -> None:
    for name, formal in zip(names, _formals(formals, len(names)), strict=False):
        if name in known:
            types.setdefault(formal.typeStr, known[name])
            types.setdefault(formal.name, known[name])


def _type_by_attribute(onnx: ModuleType, node: onnx.NodeProto, schema: _Schema, kind: str) -> str | None:
    """Returns the type that an attribute states, or the only type that is allowed."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i:
            return _tensor(onnx, attribute.i)
        if attribute.name == "value" and attribute.HasField("t"):
            return _tensor(onnx, attribute.t.data_type)
    allowed = schema.allowed.get(kind, ())
    return str(allowed[0]) if len(allowed) == 1 else None


def _tensor(onnx: ModuleType, code: int) -> str:
    name = onnx.TensorProto.DataType.Name(code).lower()
    return f"tensor({name})"
