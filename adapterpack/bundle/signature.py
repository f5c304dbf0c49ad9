"""The signature of a graph: names, dtypes and shapes of its inputs, outputs and slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from ..errors import Unsupported


@dataclass(frozen=True)
class Port:
    """One input or output of a graph. A variable extent is a name, or None if the graph does not name it."""

    name: Annotated[str, Meta(min_length=1, max_length=1024)]
    dtype: Annotated[str, Meta(pattern=r"^[a-z0-9_]{1,32}\Z")]
    shape: Annotated[
        tuple[Annotated[int, Meta(ge=0)] | Annotated[str, Meta(max_length=200)] | None, ...],
        Meta(max_length=8),
    ]


Ports = Annotated[tuple[Port, ...], Meta(max_length=1 << 16)]


@dataclass(frozen=True)
class GraphSignature:
    """The signature of a graph. ``inputs`` must be fed; ``slots`` may be fed: ONNX Runtime calls such inputs
    with a default overridable initializers.
    """

    inputs: Ports = ()
    outputs: Ports = ()
    slots: Ports = ()


def signature_of(model: Any) -> GraphSignature:
    """Returns the signature of an ``onnx_ir`` model.

    Raises:
        Unsupported: an input or output has no type.
    """
    ports = [_port(value) for value in model.graph.inputs]
    return GraphSignature(
        tuple(port for port in ports if port.name not in model.graph.initializers),
        tuple(_port(value) for value in model.graph.outputs),
        tuple(port for port in ports if port.name in model.graph.initializers),
    )


def _port(value: Any) -> Port:
    if value.dtype is None:
        raise Unsupported(
            "the graph does not fit together: the type of an output cannot be inferred",
            where=value.name,
            remedy="build it with another --frontend",
        )
    shape = () if value.shape is None else value.shape
    return Port(
        value.name,
        value.dtype.numpy().name,
        tuple(dim if isinstance(dim, int) else dim.value for dim in shape),
    )
