"""Reads and writes trees of composition as JSON values, checked and within limits.

A leaf is ``{"member": "a"}``, a node ``{"kind": "sum", "of": [...], "weights": [...]}`` with the settings of
its kind.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from ...errors import FormatError, nearest
from .base import Leaf, Node, NodeKind, Tree
from .registry import NODES

MAX_DEPTH = 6
MAX_LEAVES = 64
"""As many as a lineage can name parents; a member may stand at several leaves."""
MEMBER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""The names that a member may have: without dots, since they are a part of the names of tensors."""


def decode(value: Any) -> Tree:
    """The tree that a JSON value says.

    Raises:
        FormatError: it is malformed, too deep or too large; ``where`` is the JSON pointer inside of
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
            found=repr(value)[:80],
        )
    if "member" in value:
        name = value["member"]
        if value.keys() != {"member"} or not isinstance(name, str) or not MEMBER.fullmatch(name):
            raise FormatError(
                "a leaf holds the name of a member and nothing else",
                where=where,
                found=repr(value)[:80],
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
            found=repr(below)[:80],
        )
    children = tuple(_decode(child, f"{where}/of/{number}", depth + 1) for number, child in enumerate(below))
    return node(
        kind, children, {key: item for key, item in value.items() if key not in {"kind", "of"}}, where
    )


def node(kind: NodeKind, children: tuple[Tree, ...], settings: dict[str, Any], where: str) -> Node:
    """A node of a kind with settings by name; lists stand for tuples.

    Raises:
        FormatError: the kind has no such setting, or cannot use the value.
    """
    names = [field.name for field in dataclasses.fields(kind.settings)]
    for name in settings:
        if name not in names:
            raise FormatError(
                f"a node of kind {kind.name} has no such setting",
                where=where,
                found=repr(name)[:80],
                expected=", ".join(names),
                remedy=nearest(name, names),
            )
    try:
        made = kind.settings(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        )
        made.check(len(children))
    except (TypeError, ValueError) as error:
        raise FormatError(f"a setting of {kind.name} cannot be used: {error}", where=where) from error
    return Node(kind.name, children, made)


def get_kind(name: Any, where: str) -> NodeKind:
    """The kind of node of that name.

    Raises:
        FormatError: there is none.
    """
    if not isinstance(name, str) or name not in NODES:
        raise FormatError(
            "unknown kind of node",
            where=where,
            found=repr(name)[:80],
            expected=", ".join(NODES),
            remedy=nearest(str(name), NODES),
        )
    return NODES[name]


def encode(tree: Tree) -> dict[str, Any]:
    """The JSON value of a tree, every setting written out.

    Example:
        >>> encode(Leaf("a"))
        {'member': 'a'}
    """
    if isinstance(tree, Leaf):
        return {"member": tree.member}
    settings = {field.name: getattr(tree.settings, field.name) for field in dataclasses.fields(tree.settings)}
    written = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {"kind": tree.kind, "of": [encode(child) for child in tree.children], **written}


def as_text(tree: Tree) -> str:
    """A tree as it is typed; settings that are the default are left out.

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
    """The members that the leaves name, from left to right; one may come several times."""
    if isinstance(tree, Leaf):
        yield tree.member
    else:
        for child in tree.children:
            yield from leaves(child)


def nodes(tree: Tree) -> Iterator[Node]:
    """The nodes of a tree, each before its children."""
    if isinstance(tree, Node):
        yield tree
        for child in tree.children:
            yield from nodes(child)


def shares(tree: Tree) -> dict[str, float]:
    """How much of each member there is: the products of the weights on the way down, of a router equal
    parts.
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
    """What a kind of node can do, for the catalogue."""
    return {
        "folds": not kind.routes,
        "in_graphs": not kind.torch_only,
        "routes": kind.routes,
        "trained": kind.trained,
        "any_member": kind.evaluate is not None,
    }
