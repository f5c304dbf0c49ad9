"""The kernels that a provider implements, by operator, version and types: extracted from a build of ONNX
Runtime and shipped as data.

With this table a graph can be checked on a machine without the device. ``benchmarks/cuda_kernels.py``
regenerates the table for another build.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from ...onnx_graph import TypedNode, typed_nodes

_SHOWN = 5
"""How many reasons an error lists."""
Kernel = tuple[int, int | None, Mapping[str, Sequence[str]]]
"""The first operator version that a kernel implements, the last one or None, and the types that it supports
for each type parameter.
"""


class Kernels(NamedTuple):
    """The kernels of a provider by operator; operators of other domains carry theirs
    (``com.microsoft.GroupQueryAttention``).
    """

    provider: str
    onnxruntime: str
    kernels: Mapping[str, Sequence[Kernel]]

    def missing(self, node: TypedNode) -> str | None:
        """Returns why the provider has no kernel for a node, or None if it has one.

        Unknown types and unknown operator versions count as supported.
        """
        kernels = self.kernels.get(node.of, ())
        if not kernels:
            return f"{node.of} has no kernel"
        fitting = [kernel for kernel in kernels if node.since is None or _of_version(kernel, node.since)]
        if not fitting:
            return f"{node.of} has no kernel for version {node.since}"
        wrong = [_wrong(kernel, node) for kernel in fitting]
        if not all(wrong):
            return None
        name = min(wrong, key=len)[0]
        there = sorted({kind for kernel in fitting for kind in kernel[2].get(name, ())})
        return (
            f"{node.of} has no kernel for {_plain(node.types[name])} as {name}, only for {', '.join(there)}"
        )


class Unfit(NamedTuple):
    """A node that a provider does not run, and the reason."""

    node: TypedNode
    reason: str


def list_unfit(nodes: Sequence[Unfit]) -> str:
    """Describes the nodes in words: each reason once, with the name of one node."""
    by_reason: dict[str, list[str]] = {}
    for node, reason in nodes:
        by_reason.setdefault(reason, []).append(node.name or node.of)
    reasons = [
        f"{reason} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
        for reason, names in by_reason.items()
    ]
    return "; ".join(reasons[:_SHOWN]) + (
        f"; {len(reasons) - _SHOWN} more reasons" if len(reasons) > _SHOWN else ""
    )


def remedy_of(nodes: Sequence[Unfit]) -> str:
    """Returns advice on how to make the provider run these nodes."""
    attention = any(
        node.operator == "GroupQueryAttention" and node.types.get("T") == "tensor(float)" for node, _ in nodes
    )
    return (
        "export with --dtype float16"
        if attention
        else "export with another --dtype, or without what these nodes are for"
    )


@cache
def kernels_of(provider: str) -> Kernels | None:
    """Returns the table of a provider, or None if none is shipped."""
    file = files(__package__) / f"{provider}_kernels.json"
    if not file.is_file():
        return None
    table: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return Kernels(
        provider,
        table["onnxruntime"],
        {
            name: [(first, last, kinds) for first, last, kinds in kernels]
            for name, kernels in table["kernels"].items()
        },
    )


def nodes_without_kernel(model: Any, table: Kernels) -> Iterator[Unfit]:
    """Yields the nodes of a model proto for which a provider has no kernel."""
    for node in typed_nodes(model):
        reason = table.missing(node)
        if reason is not None:
            yield Unfit(node, reason)


def _of_version(kernel: Kernel, since: int) -> bool:
    """Compares versions as ONNX Runtime does: a kernel without a last version matches only operators that
    have not changed since its first.
    """
    first, last, _ = kernel
    return first == since or (last is not None and first < since <= last)


def _wrong(kernel: Kernel, node: TypedNode) -> list[str]:
    """Returns the type parameters of a node that a kernel does not support."""
    return [
        name
        for name, kinds in kernel[2].items()
        if name in node.types and _plain(node.types[name]) not in kinds
    ]


def _plain(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")")
