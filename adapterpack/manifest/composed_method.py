"""Finds the method of a pack: a registered one, or the method that its composition builds from the members'
methods.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from ..adapter_methods import Method, get
from ..errors import FormatError, UnknownMethod
from . import manifest as m
from .structs import Composition

FEATURE = "composition"
"""The ``must_understand`` entry of a composed pack."""


def method_of(manifest: m.Manifest) -> Method:
    """Returns the method that evaluates a pack.

    Raises:
        UnknownMethod: the method, or a member's method, is not registered.
        FormatError: the tree is malformed, or does not fit the members.
        Unsupported: a member cannot be part of the tree.
    """
    if manifest.composition is None:
        return get(manifest.method.type)
    # imported late, because few packs are composed
    from ..adapter_methods.nodes.composed import NAME  # noqa: PLC0415

    if manifest.method.type != NAME:
        raise FormatError(
            "a pack with a composition has another method",
            where="/method/type",
            expected=NAME,
            found=manifest.method.type,
        )
    return method_of_composition(manifest.composition)


def method_of_composition(composition: Composition) -> Method:
    """Returns the method that a composition builds from its members' methods; equal compositions give the
    same object.

    Raises:
        UnknownMethod, FormatError, Unsupported: as of :func:`method_of`.
    """
    return _compose(msgspec.json.encode(composition, order="sorted"))


@lru_cache(maxsize=64)
def _compose(text: bytes) -> Method:
    from ..adapter_methods.nodes import decode, leaves  # noqa: PLC0415 - as above
    from ..adapter_methods.nodes.composed import compose_method  # noqa: PLC0415 - as above

    composition = msgspec.json.decode(text, type=Composition)
    tree = decode(composition.tree)
    names = [member.name for member in composition.members]
    named = set(leaves(tree))
    if len(set(names)) != len(names) or set(names) != named:
        raise FormatError(
            "the tree and the members do not name the same adapters",
            where="/composition/members",
            expected=", ".join(sorted(named)),
            found=", ".join(names),
        )
    methods = {}
    for member in composition.members:
        methods[member.name] = method = get(member.method)
        if member.spec_version > method.config.spec_version:
            raise UnknownMethod(
                f"a member was made by a newer version of the method {method.name}",
                where=f"member '{member.name}'",
                expected=f"spec_version {method.config.spec_version}",
                found=member.spec_version,
                remedy=f"update the package that brings {method.name}",
            )
    return compose_method(tree, methods, composition)
