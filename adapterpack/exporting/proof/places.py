"""Compares the weights of a graph's layers with the checkpoint's tensors of these layers, a few rows at a
time: a graph too large to be run in torch has them at least where they belong.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from ...adapter_methods import row_blocks, to_matrix
from ...base import Checkpoint
from ...bundle import MappedSite, SiteMap, graph_file
from ...errors import ParityError
from ...graph_passes import TABLE
from ...onnx_graph import GraphFile, cast, near_rows, quantized_nodes, scales_of

_KINDS = frozenset({"linear", "lookup"})
_HALF = 0.501
"""How far a number may lie from its code: half a step, and a few roundings of float32."""


def require_places(folder: Path, sites: SiteMap, base: Checkpoint) -> int:
    """Compares the weight of each of the ``sites`` of a bundle's graphs that is a linear layer or an
    embedding with the tensor of that layer: bit by bit after a cast, or within the rounding of its codes.
    Returns how many there are.

    Raises:
        ParityError: a graph has other numbers there, or no layer has a tensor of its name.
    """
    graph = cache(lambda part: GraphFile(folder / graph_file(part)))
    codes = cache(lambda part: {nbits.weight: nbits for nbits in quantized_nodes(graph(part))})
    placed = 0
    for path, site in sites.items():
        name = base.tensor_name(f"{path}.weight")
        if name is None or site.kind not in _KINDS or site.members or not site.weight:
            continue
        table = site.kind == "lookup"
        matrix = base.view(name) if table else to_matrix(base.linear_kind(name) or "linear", base.view(name))
        weight = site.weight.removesuffix(TABLE)  # the codes of a head, if that is tied to an embedding
        if weight in codes(site.part):
            nbits = codes(site.part)[weight]
            fits = nbits.columns == matrix.shape[1] and site.at + len(matrix) <= nbits.rows
            right = fits and bool(near_rows(graph(site.part), nbits, matrix, site.at).all())
        elif (scales := scales_of(weight)) in graph(site.part).stored:
            right = _rounds(graph(site.part), weight, scales, matrix, site.at)
        else:
            right = _holds(graph(site.part), site, matrix)
        if not right:
            raise ParityError(
                "the graph has other numbers in the place of a layer of the checkpoint",
                where=f"{folder.name}/{graph_file(site.part)}, {site.weight}",
                expected=name,
                remedy="choose another --frontend, and report this architecture",
            )
        placed += 1
    if not placed:
        raise ParityError(
            "the checkpoint names none of the graph's layers, so that nothing shows their places",
            where=folder.name,
            remedy="export with --proof full",
        )
    return placed


def _rounds(graph: GraphFile, codes: str, scales: str, matrix: np.ndarray, at: int) -> bool:
    """Returns whether columns of codes in eight bits, from ``at`` on, are the rows of a matrix to nearest."""
    columns = graph.array(codes).T[at : at + len(matrix)]
    steps = graph.array(scales)[at : at + len(matrix)]
    return columns.shape == matrix.shape and all(
        (
            np.abs(columns[block] * steps[block, None] - matrix[block].astype(np.float32))
            <= _HALF * steps[block, None]
        ).all()
        for block in row_blocks(*matrix.shape)
    )


def _holds(graph: GraphFile, site: MappedSite, matrix: np.ndarray) -> bool:
    if site.weight not in graph.stored:
        return False
    stored = graph.array(site.weight)
    turned = site.layout == "in_out" and site.kind == "linear"
    rows = (stored.T if turned else stored)[site.at : site.at + len(matrix)]
    return rows.shape == matrix.shape and all(
        np.array_equal(
            np.ascontiguousarray(rows[block]).view(np.uint8),
            np.ascontiguousarray(cast(matrix[block], stored.dtype)).view(np.uint8),
        )
        for block in row_blocks(*matrix.shape)
    )
