"""Packs sibling projections: MatMuls that read the same value (q, k and v; gate and up) become one MatMul and
a Split.

In a bank, one slot holds the ``down`` factors of adapted siblings side by side: ``x [D_1 ... D_k]`` is one
MatMul, and an even Split gives each sibling its part. The ``up`` factors stay separate: a block-diagonal
matrix is mostly zeros, which a bank would gather for every row. The mode that takes one adapter as inputs
shares nothing (decision 34).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..bundle import MappedSite, SiteMap
from ..onnx_graph import add_initializer
from .attach import AttachPlan

_OWN_INPUT = frozenset({"pre", "turn", "turn_down", "head", "attended_keys"})
"""Fields that give a site's base product its own input or weights, so that siblings cannot share the product.
"""


def pack_siblings(model: ir.Model, every: SiteMap, plan: AttachPlan, share: bool) -> AttachPlan:
    """Packs the siblings among ``every`` linear site of ``model``, in place, and returns the updated plan;
    with ``share``, the siblings' ``down`` factors are in one slot.

    Requires: nothing; siblings stay apart where an adapter changes the input or the weights of one, or where
    they differ in dtype or layout.
    Ensures: the graph computes the same, each output keeps its name, and a packed weight is the siblings'
    weights side by side.
    """
    sites = dict(plan.sites)
    placed = dict(every)
    nodes = {node.name: node for node in model.graph}
    for siblings in _groups(nodes, every, plan.sites):
        # layers.0.attn.q_proj+k_proj
        path = "+".join([siblings[0].path, *(site.path.rpartition(".")[2] for site in siblings[1:])])
        packed = _pack(model, [nodes[site.node] for site in siblings], path)
        # each site keeps its own columns of the packed weight, from ``at`` on
        start = 0
        for site in siblings:
            moved = {"node": packed.name, "weight": packed.inputs[1].name, "at": start}
            start += site.out_features
            placed[site.path] = dataclasses.replace(site, **moved)
            if site.path in sites:
                sites[site.path] = dataclasses.replace(sites[site.path], **moved)
        members = [site.path for site in siblings if "down" in getattr(sites.get(site.path), "fields", ())]
        if share and len(members) > 1:
            sites = _share(sites, path, members, packed.outputs[0].name)
    return plan._replace(sites=sites, every=placed)


def _groups(nodes: Mapping[str, ir.Node], every: SiteMap, planned: SiteMap) -> Iterator[list[MappedSite]]:
    """Returns the groups of sites that have one parent module and read one value, in graph order."""
    groups: dict[tuple[str, str], list[MappedSite]] = {}
    for site in every.values():
        slot_fields = planned[site.path].fields if site.path in planned else ()
        if site.weight and _packable(nodes[site.node], site) and not _OWN_INPUT & set(slot_fields):
            groups.setdefault((site.path.rpartition(".")[0], site.input), []).append(site)
    return (
        group
        for group in groups.values()
        if len(group) > 1 and len({nodes[site.node].inputs[1].dtype for site in group}) == 1
    )


def _packable(node: ir.Node, site: MappedSite) -> bool:
    weight = node.inputs[1]
    return (
        node.op_type == "MatMul"
        and site.layout == "in_out"
        and site.at == 0
        and weight.shape == (site.in_features, site.out_features)
        and len(weight.uses()) == 1
        and not weight.is_graph_input()
    )


def _pack(model: ir.Model, old: Sequence[ir.Node], path: str) -> ir.Node:
    """Replaces several MatMuls by one MatMul and a Split, and returns the MatMul."""
    x = old[0].inputs[0]
    weights = [node.inputs[1] for node in old]
    widths = [weight.shape[1] for weight in weights]
    tensors = [weight.const_value for weight in weights]
    # lazy, so that the packed weight is in memory only while it is written
    joint = ir.LazyTensor(
        lambda: ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=1)),
        tensors[0].dtype,
        ir.Shape([weights[0].shape[0], sum(widths)]),
        name=f"{path}.weight_t",
    )
    weight = add_initializer(model.graph, joint)
    sizes = add_initializer(model.graph, ir.tensor(np.array(widths, np.int64), name=f"{path}.widths"))
    product = ir.node("MatMul", [x, weight], name=f"{path}/MatMul")
    product.outputs[0].name = f"{path}/product"
    product.outputs[0].type = old[0].outputs[0].type
    product.outputs[0].shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], sum(widths)])
    split = ir.node(
        "Split", [product.outputs[0], sizes], {"axis": -1}, name=f"{path}/Split", num_outputs=len(old)
    )
    apart = [node.outputs[0] for node in old]
    ir.convenience.replace_nodes_and_values(model.graph, old[0], old, [product, split], apart, split.outputs)
    # no node reads the single weights any more
    for packed in weights:
        del model.graph.initializers[packed.name]
    return product


def _share(sites: SiteMap, path: str, members: Sequence[str], product: str) -> dict[str, MappedSite]:
    """Returns the sites with the group's site before its members; the group takes over their slots for
    ``down``.
    """
    first = sites[members[0]]
    group = dataclasses.replace(
        first,
        path=path,
        weight="",
        bias=None,
        at=0,
        fields=("down",),
        members=tuple(members),
        positional=False,
        output=product,
        out_features=sum(sites[member].out_features for member in members),
        entry=None,
        ranks={},
    )
    sites_with_group = {}
    for name, site in sites.items():
        # before its members: a member's branch reads what the group's site computes
        if name == members[0]:
            sites_with_group[path] = group
        own = tuple(field for field in site.fields if field != "down" or name not in members)
        sites_with_group[name] = dataclasses.replace(site, fields=own)
    return sites_with_group
