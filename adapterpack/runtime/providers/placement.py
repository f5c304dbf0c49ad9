"""Finds the nodes of an open session that run on the CPU instead of the chosen provider, and why.

ONNX Runtime silently assigns nodes without a kernel to the CPU and copies their inputs and outputs. It also
puts nodes there on purpose that compute shapes from values on the CPU; those are no problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnxruntime as ort

from ...errors import ProviderError
from ...onnx_graph import GraphFile, TypedNode, typed_nodes
from ...readable import things
from .kernels import Unfit, kernels_of, list_unfit, remedy_of
from .provider import CPU
from .resolved_device import ResolvedDevice


class CpuNodesWarning(UserWarning):
    """Nodes run on the CPU instead of the chosen provider."""


def nodes_by_provider(session: ort.InferenceSession) -> dict[str, list[tuple[str, str, str]]]:
    """Returns the name, domain and operator of each node, grouped by the provider that runs it."""
    placed: dict[str, list[tuple[str, str, str]]] = {}
    for part in session.get_provider_graph_assignment_info():
        placed.setdefault(part.ep_name, []).extend(
            (node.name, node.domain, node.op_type) for node in part.get_nodes()
        )
    return placed


def nodes_on_cpu(session: ort.InferenceSession, resolved: ResolvedDevice, path: Path) -> list[Unfit]:
    """Returns the nodes of the graph at ``path`` that a session runs on the CPU because its provider cannot,
    without those that compute shapes.
    """
    left = nodes_by_provider(session).get(CPU, [])
    return list(_unfit(left, resolved, path)) if left else []


def check_placement(session: ort.InferenceSession, resolved: ResolvedDevice, path: Path) -> list[Unfit]:
    """Returns the nodes on the CPU, if the device permits them.

    Raises:
        ProviderError: nodes run on the CPU, and the device does not permit it.
    """
    nodes = nodes_on_cpu(session, resolved, path)
    if nodes and not resolved.device.allow_cpu_nodes:
        raise ProviderError(
            f"{things(len(nodes), 'node')} of the graph would run on the CPU",
            where=path,
            expected=resolved.provider.runtime_name,
            found=list_unfit(nodes),
            remedy=f"{remedy_of(nodes)}, or allow it with --allow-cpu-nodes",
        )
    return nodes


def _unfit(left: list[tuple[str, str, str]], resolved: ResolvedDevice, path: Path) -> Iterator[Unfit]:
    table = kernels_of(resolved.provider.name)
    known: Mapping[str, TypedNode] = {
        node.name: node for node in typed_nodes(GraphFile(path).model) if node.name
    }
    for name, domain, operator in left:
        domain = "" if domain == "ai.onnx" else domain  # noqa: PLW2901
        node = known.get(name)
        # a node that ONNX Runtime fused or inserted; its types are unknown
        if node is None or node.operator != operator:
            node = TypedNode(name, domain, operator, None, {})
        if table is not None:
            reason = table.missing(node)
        else:
            reason = (
                f"{node.of} was left by {resolved.provider.runtime_name}" if not _of_shapes(node) else None
            )
        if reason is not None:
            yield Unfit(node, reason)


def _of_shapes(node: TypedNode) -> bool:
    """Returns whether a node yields no floats, as nodes that compute shapes do. This decides if there is no
    table of kernels.
    """
    return all(
        not kind.startswith(("tensor(float", "tensor(bfloat", "tensor(double"))
        for kind in node.types.values()
    )
