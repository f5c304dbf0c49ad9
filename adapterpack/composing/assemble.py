"""Assembles several packs, unchanged, into one pack with a tree that says how the runtime combines them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..adapter_methods import Arrays, Method, Site, Tensors, complete, shapes_of
from ..adapter_methods.nodes import Tree, decode, encode, leaves, node, shares
from ..adapter_methods.nodes.base import Leaf, Node
from ..adapter_methods.nodes.composed import NAME, compose_method, is_random, make_own
from ..adapter_methods.nodes.registry import NODES
from ..adapter_methods.nodes.tree import MEMBER
from ..errors import ConfigError, FormatError, Unsupported, require_among
from ..manifest import Composition
from ..manifest import manifest as m
from ..manifest.structs import CompositionMember
from ..pack import Adapter, Pack, descend
from .compatibility import common_base, common_problem, common_task, require_same_site
from .full_modules import CombinedModules, average
from .result import build_composed
from .tree_syntax import parse

TreeLike = str | Mapping[str, Any] | Leaf | Node
"""The text of a tree, the JSON value of a tree, or a tree."""


def assemble(
    parents: Sequence[Pack], tree: TreeLike, name: str, seed: int = 0, shared: Tensors | None = None
) -> Pack:
    """Returns a pack that contains ``parents`` unchanged, each under its name, and combines them as ``tree``
    says.

    ``shared``: the parameters that nodes have once for all sites, where they are trained already.

    Raises:
        FormatError: ``shared`` are not those of the tree.
        ConfigError: the tree cannot be read, or names other packs than there are.
        BaseMismatch: the packs belong to different bases.
        Unsupported: a pack cannot be part of the tree.
    """
    if seed < 0:
        raise ConfigError(
            "a seed is a whole number", where="seed", expected="from 0 on", found=seed, remedy="give another"
        )
    base = common_base(parents)
    task = common_task(parents)
    chosen = _with_base_width(read_tree(tree), base)
    by_name = _members(parents, chosen)
    members = tuple(
        CompositionMember(name, pack.id, pack.method.name, pack.method.config.spec_version)
        for name, pack in by_name.items()
    )
    method = compose_method(
        chosen, {name: pack.method for name, pack in by_name.items()}, Composition(encode(chosen), members)
    )
    by_path: dict[str, dict[str, tuple[m.Group, Adapter]]] = {}
    for member, pack in by_name.items():
        for group, adapter in zip(pack.manifest.adapter_groups, pack.adapters(), strict=True):
            by_path.setdefault(adapter.site.path, {})[member] = (group, adapter)
    sites = [_site(method, parts) for parts in by_path.values()]
    adapters = {
        site: _adapter(method, site, parts, by_name, seed)
        for site, parts in zip(sites, by_path.values(), strict=True)
    }
    part = shares(chosen)
    weights = {
        group.path: group.weight
        for parts in by_path.values()
        for group, _ in parts.values()
        if group.weight is not None
    }
    modules = average(parents, [part[member] for member in by_name])
    return build_composed(
        name,
        method,
        adapters,
        base,
        CombinedModules(task, modules, common_problem(parents)),
        parents,
        weights,
        descend(NAME, parents, {"seed": seed} if is_random(method) else {}),
        _shared_parameters(method, adapters, seed, shared),
    )


def read_tree(tree: TreeLike) -> Tree:
    """Reads a tree from text, from the JSON value of a tree, or returns a tree as it is.

    Raises:
        ConfigError, FormatError: it cannot be read.
    """
    if isinstance(tree, Leaf | Node):
        return decode(encode(tree))
    return parse(tree) if isinstance(tree, str) else decode(tree)


def _with_base_width(tree: Tree, base: m.Base) -> Tree:
    """Fills in the settings of the tree that follow from the base: the width of its hidden states."""
    if isinstance(tree, Leaf):
        return tree
    settings = tree.settings
    if getattr(settings, "hidden", 1) == 0:
        if base.dims is None or base.dims.hidden is None:
            raise ConfigError(
                "the packs do not say how wide the base's hidden states are",
                where=f"tree, {tree.kind}",
                remedy=f"say it: {tree.kind}(..., hidden=768)",
            )
        settings = dataclasses.replace(settings, hidden=base.dims.hidden)
    written = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return node(
        NODES[tree.kind], tuple(_with_base_width(child, base) for child in tree.children), written, ""
    )


def _members(parents: Sequence[Pack], tree: Tree) -> dict[str, Pack]:
    by_name = {pack.name: pack for pack in parents}
    if len(by_name) < len(parents):
        raise ConfigError(
            "two packs have the same name",
            where="tree",
            found=", ".join(pack.name for pack in parents),
            remedy="rename one: NAME=PATH",
        )
    for name, pack in by_name.items():
        if not MEMBER.fullmatch(name):
            raise ConfigError(
                "a member's name holds letters, digits, _ and - only",
                where="tree",
                found=repr(name),
                remedy="rename it: NAME=PATH",
            )
        if pack.acts is not None:
            raise Unsupported(
                "this pack acts at some positions of a row only, which a tree does not divide",
                where=f"pack '{name}'",
                found=str(pack.acts)[:200],
                remedy="make it active together with the composed pack",
            )
        if pack.method.config.composition is not None:
            raise Unsupported(
                "this pack is composed itself",
                where=f"pack '{name}'",
                remedy="write one tree over the packs that it was made of",
            )
        if len(pack.methods) > 1:
            raise Unsupported(
                "this pack has several methods, and a member of a tree has one",
                where=f"pack '{name}'",
                found=", ".join(method.name for method in pack.methods),
                remedy="make it active together with the composed pack, or train its parts as two packs",
            )
    named = list(dict.fromkeys(leaves(tree)))
    for name in named:
        what = "the tree names a pack that is not given"
        given = ", ".join(by_name)
        require_among(what, name, by_name, ConfigError, "tree", found=name, expected=given)
    if unused := [name for name in by_name if name not in named]:
        raise ConfigError(
            "the tree does not name every pack",
            where="tree",
            found=", ".join(named),
            expected=", ".join(unused),
            remedy="leave the others out",
        )
    return by_name


def _site(method: Method, parts: Mapping[str, tuple[m.Group, Adapter]]) -> Site:
    """Returns the site if all members at it describe the same one."""
    sites = [adapter.site for _, adapter in parts.values()]
    first = sites[0]
    names = list(parts)
    for name, site in zip(names, sites, strict=True):
        require_same_site((names[0], first), (name, site))
        if site.kind not in method.traits.layers:
            raise Unsupported(
                "a tree of these nodes has no such kind of site",
                where=f"{site.path} in '{name}'",
                found=site.kind,
                expected=" or ".join(method.traits.layers),
                remedy="leave the pack out, or merge it",
            )
    return dataclasses.replace(first, bias=any(site.bias for site in sites))


def _adapter(
    method: Method,
    site: Site,
    parts: Mapping[str, tuple[m.Group, Adapter]],
    packs: Mapping[str, Pack],
    seed: int,
) -> tuple[Any, Arrays]:
    members = {name: {**packs[name].manifest.config, **group.config} for name, (group, _) in parts.items()}
    cfg = method.config(members=members)
    params = {
        f"{name}/{key}": value for name, (_, adapter) in parts.items() for key, value in adapter.wide.items()
    }
    # such members may need the base's weight, which is not loaded here
    if not any(spot.kind.made for spot in method.config.spots):
        return cfg, params
    return cfg, {**params, **make_own(method, cfg, complete(method, cfg, params, site), site, seed)}


def _shared_parameters(
    method: Method, adapters: Mapping[Site, tuple[Any, Any]], seed: int, trained: Tensors | None
) -> Tensors:
    """Returns the parameters that the nodes have once for all sites: the ``trained`` ones after checking that
    they have the shapes that the tree gives them, or else initial values.
    """
    shared, (cfg, _), sites = method.storage.shared, next(iter(adapters.values())), list(adapters)
    if trained is None:
        return {} if shared is None else shared.init(cfg, sites, np.random.default_rng(seed))
    wanted = {} if shared is None else shared.shapes(cfg, sites)
    found = shapes_of(trained)
    if found != wanted:
        raise FormatError(
            "the parameters of the nodes are not those of this tree",
            where="tree",
            expected=wanted,
            found=found,
        )
    return trained
