"""Finds the values that enter and leave a block of the model in a graph, by the scopes that exporters record
on nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir

from ..bundle import MappedSite, SiteMap
from ..errors import Unsupported
from ..pack import Pack
from .sites import Scope, float_type

_FUSED = {
    "SkipSimplifiedLayerNormalization": "RMSNormalization",
    "SkipLayerNormalization": "LayerNormalization",
}
"""A norm with a residual sum fused into it -> the norm alone."""


class Wanted(NamedTuple):
    """A block that packs change: the width of its output, and the module whose input the packs read, if
    any.
    """

    width: int
    entry: str | None = None


def wanted_blocks(packs: Iterable[Pack]) -> dict[str, Wanted]:
    """Maps the path of each block that packs change to what they need from it.

    Raises:
        Unsupported: two packs read the inputs of different modules at one block.
    """
    wanted: dict[str, Wanted] = {}
    for pack in packs:
        for adapter in pack.adapters() if pack.method.kind == "activation" else ():
            source = getattr(adapter.config, "source", "output")
            path = adapter.site.path
            entry = {"output": None, "input": path}.get(source, source)
            block = wanted.setdefault(path, Wanted(adapter.site.out_features, entry))
            if None not in {block.entry, entry} and block.entry != entry:
                raise Unsupported(
                    "two packs read the inputs of different modules here",
                    where=path,
                    expected=block.entry,
                    found=entry,
                    remedy="export them apart",
                )
            wanted[path] = block._replace(entry=block.entry or entry)
    return wanted


def find_blocks(
    model: ir.Model, scope: Scope, wanted: Mapping[str, Wanted], linear: SiteMap
) -> dict[str, MappedSite]:
    """Returns each wanted block for which exactly one value ``[..., width]`` leaves its scope, and exactly
    one enters its entry module's scope.

    A block that is a linear module keeps its site from ``linear`` and gets the entry.
    """
    nodes = [(node, scope(node) or "") for node in model.graph]
    blocks = {}
    for path, (width, entry) in wanted.items():
        output = _single(leaving(_within(nodes, path)), width)
        source = None if entry is None else _single(entering(_within(nodes, entry)), width)
        if output is not None and (entry is None or source is not None):
            block = MappedSite(
                path,
                output.producer().name,
                output.name,
                output.name,
                "",
                None,
                "in_out",
                width,
                width,
                len(output.shape),
                dtype=float_type(output),
            )
            blocks[path] = dataclasses.replace(
                linear.get(path, block), entry=None if source is None else source.name
            )
    return blocks


def split_fused_norms(model: ir.Model, scope: Scope) -> Scope:
    """Splits residual sums out of the norms that a frontend fused them into, in place, and returns a scope
    function that knows the new nodes.

    Such a sum is a layer's output, so it belongs to the layer that computes the summand.

    Requires: nothing; a norm that also adds a bias stays fused.
    Ensures: values keep their names and numbers.
    """
    path_by_node = {}
    # a fifth input would be a bias inside the sum
    for node in [node for node in model.graph if node.op_type in _FUSED and len(node.inputs) <= 4]:
        residual, added, *affine = node.inputs
        total = ir.node("Add", [residual, added], name=f"{node.name}/sum")
        norm = ir.node(
            _FUSED[node.op_type],
            [total.outputs[0], *affine],
            {"axis": -1, "epsilon": node.attributes["epsilon"].value},
            name=f"{node.name}/norm",
        )
        for old, new in (
            (node.outputs[0], norm.outputs[0]),
            (node.outputs[3] if len(node.outputs) > 3 else None, total.outputs[0]),
        ):
            new.shape, new.type = added.shape, added.type
            new.name = f"{node.name}/total" if old is None else old.name
            for user, index in [] if old is None else list(old.uses()):
                user.replace_input_with(index, new)
        path_by_node[total], path_by_node[norm] = _layer_of(scope(added.producer())), scope(node)
        model.graph.insert_before(node, [total, norm])
        model.graph.remove(node, safe=True)
    return lambda node: path_by_node[node] if node in path_by_node else scope(node)


def _layer_of(path: str | None) -> str | None:
    """Returns the path up to its last number, or None."""
    parts = (path or "").split(".")
    last = max((place for place, part in enumerate(parts) if part.isdigit()), default=None)
    return None if last is None else ".".join(parts[: last + 1])


def _within(nodes: Sequence[tuple[ir.Node, str]], path: str) -> set[ir.Node]:
    return {node for node, node_path in nodes if node_path == path or node_path.startswith(f"{path}.")}


def leaving(members: set[ir.Node]) -> Iterator[ir.Value]:
    """Yields the values of these nodes that other nodes read or that are graph outputs."""
    return (
        value
        for node in members
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in members for use in value.uses())
    )


def entering(members: set[ir.Node]) -> Iterator[ir.Value]:
    """Yields the values that these nodes read from outside, except constants."""
    return (
        value
        for node in members
        for value in node.inputs
        if value is not None and value.producer() not in members and not value.is_initializer()
    )


def _single(values: Iterator[ir.Value], width: int) -> ir.Value | None:
    """Returns the only value ``[batch, width]`` or ``[batch, positions, width]``; None if there is none or
    several, or if a value of unknown shape could be another.
    """
    fitting = {
        value.name: value
        for value in values
        if (
            not value.is_graph_output()
            if value.shape is None
            else len(value.shape) in {2, 3} and value.shape[-1] == width
        )
    }
    only = next(iter(fitting.values())) if len(fitting) == 1 else None
    return None if only is None or only.shape is None else only
