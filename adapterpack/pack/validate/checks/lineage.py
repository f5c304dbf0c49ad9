"""Checks the recorded origin of a pack: parents by digest, no cycles, within limits. AP901-AP904."""

from __future__ import annotations

from collections.abc import Iterator

from ...lineage import MAX_DEPTH, depths
from .context import Subject
from .finding import Finding, check_rule

CYCLE = check_rule("AP901")
DEPTH = check_rule("AP902")
STRAY = check_rule("AP903")
NOTHING = check_rule("AP904")


def lineage(s: Subject) -> Iterator[Finding]:
    """AP901-AP904, from the manifest alone: parents are never fetched."""
    recorded = s.manifest.lineage
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
