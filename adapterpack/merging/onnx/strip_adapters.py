"""Removes the adapter slots from a bundle's graph, which restores the graph from before adapters were
attached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...bundle import ADAPTER_IDS, ADAPTER_POSITIONS, ADDED, GRAPH, Bundle
from ...errors import FormatError
from ...onnx_graph import save_graph, values_of
from ...tasks import AXES


def strip_adapters(source: Path, bundle: Bundle, out: Path) -> None:
    """Writes the graph of the bundle at ``source`` to ``out`` (with external data), without the slots and the
    nodes that read them.

    Raises:
        FormatError: the graph does not match the site map.
    """
    import onnx_ir as ir  # noqa: PLC0415 - only a bundle with slots needs it

    model = ir.load(source / GRAPH)
    graph = model.graph
    added = {node for node in graph if (node.name or "").startswith(ADDED)}
    values = values_of(graph)
    heads = {
        path: values.get(f"{site.output}/base") or values.get(site.output)
        for path, site in bundle.sites.items()
        if "head" in site.fields
    }

    def original(value: Any) -> Any:
        """The value before adapters were attached: the first input of an added node, the last of a choice by
        positions, or the output that an added head replaced.
        """
        while value.producer() in added:
            node = value.producer()
            path = next((path for path in heads if node.name.startswith(f"{ADDED}{path}/")), None)
            plain = node.inputs[-1 if node.op_type == "Where" else 0]
            value = plain if path is None else heads[path]
            if value is None:
                raise FormatError(
                    "the bundle's graph does not fit its site map",
                    where=source / GRAPH,
                    found=node.name,
                    remedy="export the bundle again",
                )
        return value

    for node in graph:
        if node not in added:
            for index, value in enumerate(node.inputs):
                if value is not None and value.producer() in added:
                    node.replace_input_with(index, original(value))
    for index, value in enumerate(graph.outputs):
        if value.producer() in added:
            name = value.name
            old = original(value)
            value.name = f"{name}/attached"
            old.name = name
            old.type = old.type or value.type
            old.shape = old.shape or value.shape
            graph.outputs[index] = old
    graph.remove(added, safe=False)
    slots = {value.name for value in graph.inputs if value.name in graph.initializers} - {*AXES}
    slots |= {ADAPTER_IDS, ADAPTER_POSITIONS}
    graph.inputs[:] = [value for value in graph.inputs if value.name not in slots]
    for name in list(graph.initializers):
        if name in slots or name.startswith(ADDED):
            del graph.initializers[name]
    save_graph(model, out)
