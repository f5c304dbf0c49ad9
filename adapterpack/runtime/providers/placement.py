"""Where the nodes of an open session run: what a provider leaves to the CPU is named, with the reason.

ONNX Runtime gives nodes for which a provider has no kernel to the CPU without an error, with copies to and
fro. It also puts nodes there on purpose that compute shapes of what is on the CPU already; those are right
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnxruntime as ort

from ...errors import ProviderError
from ...onnx_graph.graph_file import GraphFile
from ...onnx_graph.node_types import TypedNode, typed_nodes
from ...readable import things
from .kernels import Unfit, kernels_of, list_unfit, remedy_of
from .provider import CPU
from .resolved_device import ResolvedDevice


class CpuNodesWarning(UserWarning):
    """Nodes run on the CPU in place of the provider that was chosen."""


def nodes_by_provider(session: ort.InferenceSession) -> dict[str, list[tuple[str, str, str]]]:
    """The name, domain and operator of each node, by the provider that runs it."""
    placed: dict[str, list[tuple[str, str, str]]] = {}
    for part in session.get_provider_graph_assignment_info():
        placed.setdefault(part.ep_name, []).extend(
            (node.name, node.domain, node.op_type) for node in part.get_nodes()
        )
    return placed


def nodes_on_cpu(session: ort.InferenceSession, resolved: ResolvedDevice, path: Path) -> list[Unfit]:
    """The nodes of the graph at ``path`` that a session runs on the CPU because its provider cannot; not
    those of shapes.
    """
    left = nodes_by_provider(session).get(CPU, [])
    return list(_unfit(left, resolved, path)) if left else []


def check_placement(session: ort.InferenceSession, resolved: ResolvedDevice, path: Path) -> list[Unfit]:
    """The nodes on the CPU, of a device that allows them.

    Raises:
        ProviderError: there are some, and the device does not.
    """
    if resolved.provider.runtime_name == CPU:
        return []
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
        # ONNX Runtime made it of others: of what types is not said
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
    """Whether a node gives numbers that count or choose, as shapes are; where there is no table to say
    more.
    """
    return all(
        not kind.startswith(("tensor(float", "tensor(bfloat", "tensor(double"))
        for kind in node.types.values()
    )
