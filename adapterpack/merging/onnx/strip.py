"""A bundle's graph without its slots: what it was before adapters were attached, for a fold that leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...bundle.manifest import ADAPTER_IDS, ADAPTER_POSITIONS, GRAPH, Bundle
from ...errors import FormatError

PREFIX = "adapterpack/"
"""What the names of all nodes begin with that attaching added."""


def strip(source: Path, bundle: Bundle, out: Path) -> None:
    """Writes the graph of the bundle at ``source`` to ``out``, its data beside it, without slots and without what reads them.

    Raises:
        FormatError: the graph is not what the site map says.
    """
    import onnx_ir as ir  # noqa: PLC0415 - only a bundle with slots needs it

    model = ir.load(source / GRAPH)
    graph = model.graph
    mine = [node for node in graph if node.name and node.name.startswith(PREFIX)]
    names = {value.name: value for node in graph for value in [*node.inputs, *node.outputs] if value is not None}
    heads = {path: names.get(f"{site.output}/base") or names.get(site.output)
             for path, site in bundle.sites.items() if "head" in site.fields}

    def before(value: Any) -> Any:
        """What the value was before attaching: the first operand of every node that attaching added, or what a head took the place of."""
        while value.producer() in members:
            node = value.producer()
            path = next((path for path in heads if node.name.startswith(f"{PREFIX}{path}/")), None)
            value = node.inputs[0] if path is None else heads[path]
            if value is None:
                raise FormatError("the bundle's graph is not what its site map says", where=source / GRAPH, found=node.name,
                                  remedy="export the bundle again")
        return value

    members = set(mine)
    for node in graph:
        if node not in members:
            for index, value in enumerate(node.inputs):
                if value is not None and value.producer() in members:
                    node.replace_input_with(index, before(value))
    for index, value in enumerate(graph.outputs):
        if value.producer() in members:
            name, old = value.name, before(value)
            value.name, old.name = f"{name}/attached", name
            old.type = old.type or value.type
            old.shape = old.shape or value.shape
            graph.outputs[index] = old
    graph.remove(mine, safe=False)
    slots = {value.name for value in graph.inputs if value.name in graph.initializers} | {ADAPTER_IDS, ADAPTER_POSITIONS}
    kept = [value for value in graph.inputs if value.name not in slots]
    graph.inputs[:] = kept
    for name in [name for name, value in graph.initializers.items() if name in slots or (name or "").startswith(PREFIX)]:
        del graph.initializers[name]
    ir.save(model, out, external_data=f"{out.name}.data")
