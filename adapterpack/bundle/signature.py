"""What a graph takes and gives: the names, dtypes and shapes of its inputs, its outputs and its slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Port:
    """One value at the edge of a graph; an extent that is not fixed has a name, and is None where the graph does not even name it."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Signature:
    """``inputs`` must be fed. ``slots`` may be fed: ONNX Runtime calls an input with a default an overridable initializer."""

    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    slots: tuple[Port, ...] = ()


def signature_of(model: Any) -> Signature:
    """The signature of an ``onnx_ir`` model."""
    ports = [_port(value) for value in model.graph.inputs]
    return Signature(
        tuple(port for port in ports if port.name not in model.graph.initializers),
        tuple(_port(value) for value in model.graph.outputs),
        tuple(port for port in ports if port.name in model.graph.initializers),
    )


def decode_signature(value: Mapping[str, Any]) -> Signature:
    """The signature in a bundle's manifest."""
    return Signature(**{kind: tuple(Port(port["name"], port["dtype"], tuple(port["shape"])) for port in ports)
                        for kind, ports in value.items()})


def _port(value: Any) -> Port:
    shape = () if value.shape is None else value.shape
    return Port(value.name, value.dtype.numpy().name, tuple(dim if isinstance(dim, int) else dim.value for dim in shape))
