"""What a provider implements: its kernels by operator, version and types, read off a build of ONNX Runtime
and shipped as data.

So a graph is checked on a machine without the device. ``benchmarks/kernels.py`` writes the table again for
another build.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from ...onnx_graph.node_types import TypedNode, typed_nodes

_SHOWN = 5
"""How many reasons an error lists."""
Kernel = tuple[int, int | None, Mapping[str, Sequence[str]]]
"""The first version of an operator that a kernel implements, the last unless it is open, and the types that
its parameters may have.
"""


class Kernels(NamedTuple):
    """The kernels of a provider by operator (``GroupQueryAttention`` of ``com.microsoft``:
    ``com.microsoft.GroupQueryAttention``).
    """

    provider: str
    onnxruntime: str
    kernels: Mapping[str, Sequence[Kernel]]

    def missing(self, node: TypedNode) -> str | None:
        """Why the provider has no kernel for a node; None where it has one.

        Types that are not known, and operators whose version is not, are taken to fit.
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
    """A node that a provider does not run, and why."""

    node: TypedNode
    reason: str


def list_unfit(nodes: Sequence[Unfit]) -> str:
    """The nodes in words, one of each reason by its name."""
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
    """What to do so that the provider runs them."""
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
    """The table of a provider, or None where there is none."""
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
    """The nodes of a model's proto that a provider has no kernel for."""
    for node in typed_nodes(model):
        reason = table.missing(node)
        if reason is not None:
            yield Unfit(node, reason)


def _of_version(kernel: Kernel, since: int) -> bool:
    """As ONNX Runtime compares: a kernel without a last version is for the operator's version in which it
    began alone.
    """
    first, last, _ = kernel
    return first == since or (last is not None and first < since <= last)


def _wrong(kernel: Kernel, node: TypedNode) -> list[str]:
    """The parameters whose types a kernel does not take."""
    return [
        name
        for name, kinds in kernel[2].items()
        if name in node.types and _plain(node.types[name]) not in kinds
    ]


def _plain(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")")
