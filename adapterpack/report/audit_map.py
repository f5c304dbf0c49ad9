"""The sites of an audit as a grid: layers from left to right, kinds of modules below each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_MOST = 48
"""Kinds of modules that a map shows: more are no map."""

Site = Mapping[str, Any]


class Grid(NamedTuple):
    """``cells`` ``[rows][columns]`` of sites, None where a layer has no such module; ``cut``: there are more
    rows than these.
    """

    rows: list[str]
    columns: list[str]
    cells: list[list[Site | None]]
    cut: bool


def grid(sites: Sequence[Site]) -> Grid:
    """The sites by module and layer, in the order in which the modules come; what has no layer stands in a
    column of its own.

    Example:
        >>> made = grid([{"path": f"net.{i}.q", "layer": i, "module": "q"} for i in (0, 10, 2)])
        >>> made.rows, made.columns
        (['q'], ['0', '2', '10'])
    """
    places = [(_before(site), str(site["module"]), site["layer"], site) for site in sites]
    stems = {before for before, _, layer, _ in places if layer is not None}
    rows: dict[str, dict[int | None, Site]] = {}
    for before, module, layer, site in places:
        label = f"{before}…{module}" if layer is not None and len(stems) > 1 else module
        rows.setdefault(label, {})[layer] = site
    layers: list[int | None] = sorted({layer for _, _, layer, _ in places if layer is not None})
    layers += [None] if any(layer is None for _, _, layer, _ in places) else []
    labels = list(rows)
    if len(labels) > _MOST:
        concern = {
            label: max(float(site["interference"]["relative"] or 0) for site in rows[label].values())
            for label in labels
        }
        chosen = set(sorted(labels, key=lambda label: -concern[label])[:_MOST])
        labels = [label for label in labels if label in chosen]
    columns = ["–" if layer is None else str(layer) for layer in layers]
    return Grid(
        labels,
        columns,
        [[rows[label].get(layer) for layer in layers] for label in labels],
        len(labels) < len(rows),
    )


def _before(site: Site) -> str:
    """What stands before the layer's number in the path."""
    path, module = str(site["path"]), str(site["module"])
    return path[: len(path) - len(module)].rstrip(".").rpartition(".")[0]
