"""Checks which other methods a pack can have at some of its sites, and computes the features that its reader
must understand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..adapter_methods import Method, Site, Tensors
from ..errors import Unsupported
from ..tasks.data import MARKED
from . import manifest as m
from .composed_method import FEATURE

Sites = Mapping[Site, tuple[Any, Tensors]]
"""Site -> its resolved config and its parameters."""


class MethodSites(NamedTuple):
    """A method of a pack with the sites at which the pack uses it."""

    method: Method
    adapters: Sites


def features(method: Method, groups: Iterable[m.Group], problem: str | None = None) -> tuple[str, ...]:
    """Returns the features that a reader must understand for a float pack of this method with these groups
    and with that ``problem`` of its head.
    """
    needed = {
        FEATURE: method.config.composition is not None,
        m.METHODS: any(group.method is not None for group in groups),
        **dict.fromkeys(MARKED & {problem}, True),
    }
    return tuple(sorted(feature for feature, has in needed.items() if has))


def require_combinable(name: str, primary: MethodSites, secondary: MethodSites, taken: set[str]) -> None:
    """Checks that a pack can have a secondary method: it shares nothing between sites, acts at the same
    positions, and uses no site in ``taken``. A composed pack has none, because its tree covers all its sites.

    Raises:
        Unsupported: the methods cannot share a pack.
    """
    method, guest = primary.method, secondary.method
    twice = sorted(taken & {site.path for site in secondary.adapters})
    both = f"{method.name} and {guest.name}"
    where = f"pack '{name}'"
    two_packs = "make two packs"
    if guest.name == method.name:
        raise Unsupported(
            "a pack has each of its methods once",
            where=where,
            found=f"{method.name} twice",
            remedy="give one configuration with all targets, or make two packs",
        )
    if twice:
        raise Unsupported(
            "two methods of one pack cannot be at one site",
            where=f"{where}, {', '.join(twice)}",
            found=both,
            remedy="choose other targets, or make two packs",
        )
    if method.config.composition is not None or guest.config.composition is not None:
        raise Unsupported(
            "a composed pack has no sites of other methods", where=where, found=both, remedy=two_packs
        )
    if guest.storage.shared is not None or guest.kind != method.kind:
        raise Unsupported(
            "this method cannot share a pack with another",
            where=where,
            found=guest.name,
            expected=f"a {method.kind} method that shares nothing between sites",
            remedy=two_packs,
        )
    acts = {cfg.acts for sites in (primary.adapters, secondary.adapters) for cfg, _ in sites.values()}
    if len(acts) > 1:
        raise Unsupported(
            "the methods of one pack must act at the same positions of a row",
            where=where,
            found=f"{both}: {', '.join(sorted(str(at or 'all') for at in acts))}"[:200],
            remedy=two_packs,
        )
