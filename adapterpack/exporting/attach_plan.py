"""Plans which slots each graph gets and their values: matches the sites of the packs with the sites of the
graphs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection
from typing import NoReturn

import numpy as np

from ..adapter_methods import LAYOUTS, PROMPT, is_bare, is_stacked, to_matrix
from ..base import Checkpoint, module_parameter, require_plain
from ..bundle import PAST, Heads, MappedSite, SiteMap, sites_in
from ..errors import ConfigError, SiteNotFound, Unsupported
from ..graph_passes import (
    AttachPlan,
    base_head,
    find_blocks,
    find_heads,
    find_sites,
    later_uses,
    prompt_site,
    split_fused_norms,
    uses_of_modules,
    wanted_blocks,
    with_fields,
    with_ranks,
)
from ..merging.checkpoint import tied_to_a_head
from ..pack import Adapter, Pack, places_on
from ..slots import PROJECTION, RANK, TURN, heads_at, largest_ranks, pack_values, project, virtual_tokens
from .frontends import BaseGraph

DEFAULT_RANK = 16
"""The largest rank of a bank that is exported without packs."""

_KINDS = {
    "embedding": "lookup",
    "table": "lookup",
    "conv": "patches",
    "prompt": "prompt",
    **{kind: "experts" for kind in LAYOUTS if is_stacked(kind)},
}
"""Layer kind in a pack -> kind of its site in a graph, for layers that are not linear."""


def plans_of(
    graph: BaseGraph,
    base: Checkpoint,
    packs: list[Pack],
    sites: dict[str, MappedSite],
    capacity: tuple[int, int | None],
    default: Collection[str] | None,
) -> dict[str, AttachPlan]:
    """Returns the attach plan of each graph, by the name of its part. Without packs, plans slots at the sites
    ``default``, or at all linear sites.

    Raises:
        SiteNotFound, Unsupported: a pack changes what the graphs have no site for.
        ConfigError: the largest rank of a bank is too small.
    """
    sites = _with_tied_heads(base, packs, sites)
    values = [
        pack_values(
            pack,
            lambda adapter: _weights(base, adapter),
            sites,
            lambda prompt, path: _project(graph, sites, prompt, path),
        )
        for pack in packs
    ]
    wanted = {name.rpartition(".")[0] for tensors in values for name in tensors}
    inputs = {value.name for value in graph.model.graph.inputs}
    # a graph without a cache has no place for a prompt
    if "input_ids" not in inputs or not any(name.startswith(PAST) for name in inputs):
        wanted |= {PROMPT for pack in packs if virtual_tokens(pack)}
    adapted = [(pack, group) for pack in packs for group in pack.manifest.adapter_groups]
    kinds = {group.path: _KINDS.get(group.kind, "linear") for _, group in adapted}
    missing = sorted(
        path for path in wanted if path not in sites or kinds.get(path, sites[path].kind) != sites[path].kind
    )
    if missing:
        _refuse(graph, base, packs, missing)
    placed = {group.path for pack, group in adapted if pack.acts is not None}
    sites = {path: dataclasses.replace(site, positional=path in placed) for path, site in sites.items()}
    slots, max_rank = capacity
    ranks = largest_ranks(values)
    needed = max(ranks.get(RANK, 0), ranks.get(TURN, 0))
    mapped = with_ranks(with_fields(sites, values, default), ranks, max_rank or 0)
    if max_rank is not None and max_rank < needed:
        raise ConfigError(
            "the largest rank does not fit", expected=f"--max-rank at least {needed}", found=max_rank
        )
    plans = {}
    for part, model in graph.parts.items():
        part_sites = sites_in(part, mapped)
        part_values = [
            {name: array for name, array in tensors.items() if name.rpartition(".")[0] in part_sites}
            for tensors in values
        ]
        plans[part] = AttachPlan(
            packs,
            part_values,
            part_sites,
            base_head(model, part_sites),
            slots,
            max_rank or needed or DEFAULT_RANK,
            part,
            later=later_uses(model, uses_of_modules(model, graph.scope)),
        )
    return plans


def _with_tied_heads(
    base: Checkpoint, packs: list[Pack], sites: dict[str, MappedSite]
) -> dict[str, MappedSite]:
    """Returns the sites, where an embedding refers to the output head that a pack changes together with it.

    Raises:
        SiteNotFound: the graph has no site for that head.
    """
    result = dict(sites)
    tables = [
        (pack, adapter)
        for pack in packs
        for adapter in pack.adapters()
        if adapter.site.kind == "table" and adapter.method.traits.tied and adapter.site.path in sites
    ]
    for pack, adapter in tables:
        path = adapter.site.path
        if not tied_to_a_head(base, pack, base.require_weight(path, adapter.weight)):
            continue
        table = sites[path]
        heads = [
            site.path
            for site in sites.values()
            if site.kind == "linear"
            and (site.in_features, site.out_features) == (table.out_features, table.in_features)
        ]
        if len(heads) != 1:
            raise SiteNotFound(
                "the graph has no site for the output head that is tied to this embedding",
                where=path,
                found=", ".join(heads) or "none",
                remedy="export with --mode folded, or choose another --frontend",
            )
        result[path] = dataclasses.replace(table, head=heads[0])
    return result


def _refuse(graph: BaseGraph, base: Checkpoint, packs: list[Pack], missing: list[str]) -> NoReturn:
    """Raises an error that explains why packs change modules at which the graph has no site."""
    if PROMPT in missing:
        raise SiteNotFound(
            "this graph was made without room for a prompt before a row's tokens",
            found=graph.version,
            remedy="export from the checkpoint with the frontend transformers, which makes it",
        )
    for pack in packs:
        for path, place in places_on(pack, base).items():
            if path in missing:
                raise Unsupported(
                    "the pack calls its layers as another version of transformers does",
                    where=pack.where,
                    found=path,
                    expected=place,
                    remedy="make a pack with the names of this one: adapterpack convert PACK "
                    "-o NEW --to pack --base BASE; or export with --mode folded",
                )
    uses = Counter(
        site.path for model in graph.parts.values() for site in uses_of_modules(model, graph.scope)
    )
    several = [path for path in missing if uses[path] > 1]
    if several:
        raise Unsupported(
            "the model uses this layer at several places, which one slot could not tell apart",
            where=several[0],
            found=f"{uses[several[0]]} uses",
            expected="1",
            remedy="export with --mode folded",
        )
    raise SiteNotFound(
        "the graph has no such site: the frontend names it otherwise, or the model's outputs do not "
        "depend on it",
        found=", ".join(missing[:5]),
        remedy="export with --mode folded, or train the adapter with targets all-linear, "
        "which leaves out what the model does not use; a vision tower is in a graph of a task with images",
    )


def sites_of(graph: BaseGraph, packs: list[Pack]) -> dict[str, MappedSite]:
    """Returns every linear module, and the blocks that packs change, in the order of the graphs, since one
    graph may compute the input of the next.

    Leaves out a module that appears in two graphs, or in one with several weights: a slot could not tell its
    uses apart.
    """
    wanted = wanted_blocks(packs)
    in_graphs = list[MappedSite]()
    for part, model in graph.parts.items():
        linear = find_heads(model, graph.scope, packs, find_sites(model, graph.scope))
        blocks = find_blocks(model, graph.scope, wanted, linear)
        if blocks.keys() != wanted.keys() and len(graph.parts) == 1:
            blocks = find_blocks(model, split_fused_norms(model, graph.scope), wanted, linear)
        place = {value.name: number for number, node in enumerate(model.graph) for value in node.outputs}
        together = _at_parameters({**linear, **blocks, **prompt_site(model)}, packs)
        ordered = sorted(together.values(), key=lambda site: place[site.output])
        in_graphs.extend(dataclasses.replace(site, part=part) for site in ordered)
    paths = [site.path for site in in_graphs]
    return {site.path: site for site in in_graphs if paths.count(site.path) == 1}


def _at_parameters(sites: dict[str, MappedSite], packs: list[Pack]) -> dict[str, MappedSite]:
    """Returns the sites, where one has the path of its weight if packs adapt that as a bare parameter.

    Raises:
        Unsupported: packs adapt both the parameter and its module.
    """
    paths = {group.path: group.kind for pack in packs for group in pack.manifest.adapter_groups}
    owners = {
        path.rpartition(".")[0]: path
        for path, kind in paths.items()
        if is_bare(kind) and path not in sites and not is_stacked(kind)
    }
    if both := sorted(owners.keys() & paths.keys()):
        raise Unsupported(
            "one pack adapts this module and another its weight, which is the same place",
            where=both[0],
            found=owners[both[0]],
            remedy="export them apart",
        )
    return {
        owners.get(path, path): dataclasses.replace(site, path=owners.get(path, path))
        for path, site in sites.items()
    }


def _project(
    graph: BaseGraph, sites: SiteMap, prompt: np.ndarray, path: str
) -> tuple[np.ndarray, np.ndarray, Heads]:
    """Applies the graph's own projections to a prompt at the attention of that path."""
    heads = heads_at(sites, path)
    site = sites[f"{path}.{PROJECTION}"]
    return *project(graph.parts[site.part], heads, prompt, site.dtype), heads


def _weights(base: Checkpoint, adapter: Adapter) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads the base's weight and bias at a site from its checkpoint."""
    require_plain(base)
    name = base.require_weight(adapter.site.path, adapter.weight)
    bias = module_parameter(name, "bias")
    return to_matrix(adapter.site.kind, base.read(name)), base.read(bias) if bias in base.tensors else None
