"""The attention before an output projection, found in a graph: the queries that it uses, its projections, its
heads and its scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ...bundle.manifest import Heads, MappedSite
from ...engine_graph.attention import attention_inputs
from ...pack.pack import Pack
from ...slots.prompt_kv import PROJECTION
from .blocks import entering, leaving
from .sitemap import Scope


def with_heads(
    model: Any, scope: Scope, packs: Iterable[Pack], sites: Mapping[str, MappedSite]
) -> dict[str, MappedSite]:
    """The sites, where packs have prompts with the attention before each output projection.

    A projection behind an attention that is not recognized stays as it is; an error follows only where a pack
    needs it.
    """
    wanted = {
        adapter.site.path for pack in packs if pack.method.kind == "attention" for adapter in pack.adapters()
    }
    with_attention = dict(sites)
    for path in sorted(wanted):
        nodes = [
            node
            for node in model.graph
            if (node_path := scope(node) or "") == path or node_path.startswith(f"{path}.")
        ]
        parts = [sites.get(f"{path}.{leaf}") for leaf in (PROJECTION, "k_proj", "v_proj")]
        attention = next(filter(None, map(attention_inputs, nodes)), None)
        if attention is None or any(part is None or part.rank != 3 for part in parts):
            continue
        out, keys, values = (part for part in parts if part is not None)
        norm = {node for node in nodes if (scope(node) or "").startswith(f"{path}.k_norm")}
        ends = tuple(
            value.name
            for side in (entering, leaving)
            for value in {end.name: end for end in side(norm)}.values()
        )
        queries, _, scale, count, width = attention
        if (
            count * width == out.in_features
            and keys.out_features == values.out_features
            and len(ends) == (2 if norm else 0)
        ):
            heads = Heads(
                queries.name,
                keys.output,
                values.output,
                ends or None,
                count,
                keys.out_features // width,
                width,
                scale,
            )
            with_attention[out.path] = dataclasses.replace(out, heads=heads)
    return with_attention
