"""Checks composed packs: the tree, its members, and the tensors computed from them. AP911-AP917."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ....adapter_methods import complete
from ....adapter_methods.nodes import decode, leaves
from ....adapter_methods.nodes.composed import derived_prefixes, make_own
from ....errors import AdapterpackError, FormatError
from ....manifest import FEATURE, method_of
from ....manifest import manifest as m
from .context import Subject, group_pointer
from .finding import Finding, check_rule

SAID = check_rule("AP911")
TREE = check_rule("AP912")
MEMBERS = check_rule("AP913")
TOGETHER = check_rule("AP914")
PARENTS = check_rule("AP915")
UNUSED = check_rule("AP916")
DERIVED = check_rule("AP917")

_RELATIVE = 1e-4
"""Relative to a direction of length one. Members in half precision are rounded, which changes a direction of
their change by less than this.
"""


def composition(manifest: m.Manifest) -> Iterator[Finding]:
    """AP911-AP916: the tree and its members. Runs before any tensor is read, because the tree determines
    which tensors there must be.
    """
    composed = manifest.composition
    if (composed is not None) != (FEATURE in manifest.must_understand):
        yield SAID.at(
            "must_understand",
            "the manifest does not say rightly whether the pack is composed",
            pointer="/must_understand",
        )
        return
    if composed is None:
        return
    try:
        tree = decode(composed.tree)
    except FormatError as error:
        detail = f": expected {error.expected}, found {error.found}" if error.expected else ""
        yield TREE.at("composition", f"{error.what}{detail}", pointer=f"/composition/tree{error.where or ''}")
        return
    names = [member.name for member in composed.members]
    named = set(leaves(tree))
    if set(names) != named or len(names) != len(named):
        yield MEMBERS.at(
            "composition",
            f"the tree names {', '.join(sorted(named))}, the members are {', '.join(names)}",
            pointer="/composition/members",
        )
        return
    try:
        method_of(manifest)
    except AdapterpackError as error:
        yield TOGETHER.at(
            "composition", error.what + (f": {error.found}" if error.found else ""), pointer="/composition"
        )
        return
    line = manifest.lineage
    ancestors = (
        set() if line is None else {parent.digest for parent in line.parents}.union(*line.ancestors.values())
    )
    if line is not None and (strays := {member.digest for member in composed.members} - ancestors):
        yield PARENTS.at("composition", f"{min(strays)[:17]} is no ancestor", pointer="/composition/members")
    there = {entry.param.partition("/")[0] for entry in manifest.tensors.values()}
    for number, name in enumerate(names):
        if name not in there:
            yield UNUSED.at(
                "composition", f"the member '{name}' has no tensors", pointer=f"/composition/members/{number}"
            )


def follows(s: Subject) -> Iterator[Finding]:
    """AP917: tensors that nodes compute from their members have the values computed from them."""
    method = s.pack.method
    if method.config.composition is None:
        return
    if not (prefixes := derived_prefixes(method)):
        return
    numbers = {group.path: number for number, group in enumerate(s.manifest.groups)}
    for adapter in s.pack.adapters():
        what = "what follows from the members"
        s.budget.require_time(what)
        # the decomposition holds the factors in float64
        s.require_memory(64 * sum(value.size for value in adapter.params.values()), what)
        expected = make_own(
            method, adapter.config, complete(method, adapter.config, adapter.wide, adapter.site), adapter.site
        )
        for key, value in expected.items():
            if (
                f"{key.partition('/')[0]}/" in prefixes
                and not np.abs(_up_to_sign(adapter.wide[key], value) - value).max() <= _RELATIVE
            ):
                yield DERIVED.at(
                    adapter.site.path,
                    f"the tensor {key} is not the one that follows from the members",
                    pointer=group_pointer(numbers[adapter.site.path]),
                )


def _up_to_sign(vectors: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Returns rows with the signs of ``like``, because the sign of a singular vector is arbitrary."""
    signs: np.ndarray = np.sum(vectors * like, axis=-1, keepdims=True)
    return vectors * np.where(signs < 0, -1.0, 1.0)
