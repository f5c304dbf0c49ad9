"""Checks after a pass of the export (packing, attaching) that the graph kept its slots and sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from ..bundle import MappedSite, SiteMap, signature_of
from ..errors import ParityError
from ..onnx_graph import values_of


def slot_names(model: ir.Model) -> set[str]:
    """Returns the names of a graph's slots."""
    return {port.name for port in signature_of(model).slots}


def require_sites(name: str, model: ir.Model, sites: SiteMap, kept: Iterable[str]) -> None:
    """Checks, after the pass ``name``, that the graph still has the slots ``kept`` and, of every site, the
    node, the input and output, and a weight that is wide enough for the outputs.

    Raises:
        ParityError: one is missing; a faulty pass removes what looks unused without an error.
    """
    lost = sorted(set(kept) - slot_names(model))
    if lost:
        raise ParityError(f"{name} removed slots of the graph", found=", ".join(lost[:5]))
    nodes = {node.name for node in model.graph}
    values = values_of(model.graph).keys()
    broken = sorted(
        site.path
        for site in sites.values()
        if site.node not in nodes
        or not {site.input, site.output} <= values
        or not _has_weight(site, model.graph.initializers)
    )
    if broken:
        raise ParityError(f"{name} lost sites of the graph", found=", ".join(broken[:5]))


def _has_weight(site: MappedSite, initializers: Mapping[str, ir.Value]) -> bool:
    """Whether a site's weight is there, with room for its outputs from ``at`` on; sites without one pass."""
    if not site.weight:
        return True
    weight = initializers.get(site.weight)
    axis = 0 if site.layout == "out_in" else -1
    return weight is not None and int(weight.shape[axis]) >= site.at + site.out_features
