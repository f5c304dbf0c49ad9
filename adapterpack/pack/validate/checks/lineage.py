"""Checks the recorded origin of a pack: parents by digest, no cycles, within limits. AP901-AP904."""

from __future__ import annotations

from collections.abc import Iterator

from ...lineage import MAX_DEPTH, depths
from .context import Subject
from .finding import CheckRule, Finding

CYCLE = CheckRule("AP901", "error", "No pack is among its own ancestors.", "pack the adapter again")
DEPTH = CheckRule(
    "AP902",
    "error",
    "The lineage is at most 8 generations deep.",
    "leave out the ancestors that lie further back",
)
STRAY = CheckRule("AP903", "error", "Every ancestor is one of a parent.", "pack the adapter again")
NOTHING = CheckRule(
    "AP904",
    "error",
    "A lineage names parents, or the format that the pack was converted from.",
    "leave the lineage out",
)


def lineage(s: Subject) -> Iterator[Finding]:
    """AP901-AP904, from the manifest alone: parents are never fetched."""
    recorded = s.pack.manifest.lineage
    if recorded is None:
        return
    if not recorded.parents and recorded.source_format is None:
        yield NOTHING.at("lineage", "the lineage names neither parents nor a source", pointer="/lineage")
    depth = depths([parent.digest for parent in recorded.parents], recorded.ancestors)
    if depth is None or s.pack.id in recorded.ancestors:
        yield CYCLE.at("lineage", "a pack is among its own ancestors", pointer="/lineage/ancestors")
        return
    if (deepest := max(depth.values(), default=0)) > MAX_DEPTH:
        yield DEPTH.at("lineage", f"the lineage is {deepest} generations deep", pointer="/lineage/ancestors")
    for digest in sorted(recorded.ancestors.keys() - depth.keys())[:1]:
        yield STRAY.at(
            "lineage", f"{digest[:17]} is no ancestor of any parent", pointer=f"/lineage/ancestors/{digest}"
        )
