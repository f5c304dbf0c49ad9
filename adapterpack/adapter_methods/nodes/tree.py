"""Reads and writes composition trees as JSON values, with checks and limits, because they come from untrusted
manifests.

A leaf is ``{"member": "a"}``, a node ``{"kind": "sum", "of": [...], "weights": [...]}`` with the settings of
its kind.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from ...errors import FormatError, excerpt, nearest, require_among
from .. import from_json
from .base import Leaf, Node, NodeKind, Tree
from .registry import NODES

MAX_DEPTH = 6
MAX_LEAVES = 64
"""As many as a lineage can have parents. A member may occur at several leaves."""
MEMBER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Valid member names; they have no dots because they are part of tensor names."""


def decode(value: Any) -> Tree:
    """Parses a JSON value as a tree.

    Raises:
        FormatError: the value is malformed, too deep or too large; ``where`` is the JSON pointer inside
            ``value``.

    Example:
        >>> decode({"kind": "parallel", "of": [{"member": "a"}, {"member": "b"}]}).kind
        'parallel'
    """
    tree = _decode(value, "", 1)
    if (count := len(list(leaves(tree)))) > MAX_LEAVES:
        raise FormatError(
            "the tree has too many leaves",
            where="",
            expected=f"at most {MAX_LEAVES}",
            found=count,
            remedy="compose in two steps",
        )
    return tree


def _decode(value: Any, where: str, depth: int) -> Tree:
    if depth > MAX_DEPTH:
        raise FormatError(
            "the tree is too deep",
            where=where,
            expected=f"at most {MAX_DEPTH} levels",
            remedy="write sums of sums as one sum",
        )
    if not isinstance(value, dict):
        raise FormatError(
            "a part of the tree is neither a member nor a node",
            where=where,
            expected="an object",
            found=excerpt(value),
        )
    if "member" in value:
        name = value["member"]
        if value.keys() != {"member"} or not isinstance(name, str) or not MEMBER.fullmatch(name):
            raise FormatError(
                "a leaf holds the name of a member and nothing else",
                where=where,
                found=excerpt(value),
                expected="letters, digits, _ and -, at most 64",
            )
        return Leaf(name)
    kind = get_kind(value.get("kind"), where)
    below = value.get("of")
    if not isinstance(below, list) or not 0 < len(below) <= MAX_LEAVES:
        raise FormatError(
            "a node needs children",
            where=where,
            expected=f"'of' with 1 to {MAX_LEAVES} of them",
            found=excerpt(below),
        )
    children = tuple(_decode(child, f"{where}/of/{number}", depth + 1) for number, child in enumerate(below))
    return node(
        kind, children, {key: item for key, item in value.items() if key not in {"kind", "of"}}, where
    )


def node(kind: NodeKind, children: tuple[Tree, ...], settings: dict[str, Any], where: str) -> Node:
    """Builds a node of a kind from settings by name; lists become tuples.

    Raises:
        FormatError: the kind has no such setting, or rejects its value.
    """
    names = [field.name for field in dataclasses.fields(kind.settings)]
    for name in settings:
        what = f"a node of kind {kind.name} has no such setting"
        known = ", ".join(names)
        require_among(what, name, names, FormatError, where, found=excerpt(name), expected=known)
    try:
        made = from_json(kind.settings, settings)
        made.check(len(children))
    except (TypeError, ValueError) as error:
        raise FormatError(f"a setting of {kind.name} cannot be used: {error}", where=where) from error
    return Node(kind.name, children, made)


def get_kind(name: Any, where: str) -> NodeKind:
    """Returns the kind of node called ``name``.

    Raises:
        FormatError: no kind has that name.
    """
    if not isinstance(name, str) or name not in NODES:
        raise FormatError(
            "unknown kind of node",
            where=where,
            found=excerpt(name),
            expected=", ".join(NODES),
            remedy=nearest(str(name), NODES),
        )
    return NODES[name]


def encode(tree: Tree) -> dict[str, Any]:
    """Returns the JSON value of a tree, with every setting.

    Example:
        >>> encode(Leaf("a"))
        {'member': 'a'}
    """
    if isinstance(tree, Leaf):
        return {"member": tree.member}
    settings = dataclasses.asdict(tree.settings)
    written = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {"kind": tree.kind, "of": [encode(child) for child in tree.children], **written}


def as_text(tree: Tree) -> str:
    """Returns a tree as a user would type it, without settings that have their default.

    Example:
        >>> as_text(decode({"kind": "sum", "of": [{"member": "a"}, {"member": "b"}], "weights": [0.5, 1]}))
        'sum(0.5*a, 1*b)'
    """
    if isinstance(tree, Leaf):
        return tree.member
    weights = getattr(tree.settings, "weights", ())
    below = [as_text(child) for child in tree.children]
    if weights:
        below = [f"{weight:g}*{text}" for weight, text in zip(weights, below, strict=True)]
    set_ = [
        f"{field.name}={_value(getattr(tree.settings, field.name))}"
        for field in dataclasses.fields(tree.settings)
        if field.name != "weights" and getattr(tree.settings, field.name) != field.default
    ]
    return f"{tree.kind}({', '.join([*below, *set_])})"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ":".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def leaves(tree: Tree) -> Iterator[str]:
    """Yields the members at the leaves from left to right, repeated if they occur several times."""
    if isinstance(tree, Leaf):
        yield tree.member
    else:
        for child in tree.children:
            yield from leaves(child)


def nodes(tree: Tree) -> Iterator[Node]:
    """Yields the nodes of a tree, each before its children."""
    if isinstance(tree, Node):
        yield tree
        for child in tree.children:
            yield from nodes(child)


def shares(tree: Tree) -> dict[str, float]:
    """Returns the total weight of each member: the product of the weights on the path from the root, summed
    over its leaves. A router counts as equal weights.
    """
    if isinstance(tree, Leaf):
        return {tree.member: 1.0}
    total: dict[str, float] = {}
    for weight, child in zip(
        NODES[tree.kind].shares(tree.settings, len(tree.children)), tree.children, strict=True
    ):
        for member, share in shares(child).items():
            total[member] = total.get(member, 0.0) + weight * share
    return total


def traits(kind: NodeKind) -> dict[str, bool]:
    """Returns the properties of a kind of node that the catalogue shows."""
    return {
        "folds": not kind.routes,
        "in_graphs": not kind.torch_only,
        "routes": kind.routes,
        "trained": kind.trained,
        "any_member": kind.evaluate is not None,
    }
