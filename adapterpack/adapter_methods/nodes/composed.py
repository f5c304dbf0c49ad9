"""The method of a composed pack: several member adapters under a tree that says how to combine them.

:func:`compose_method` returns an ordinary :class:`Method`, so that no other code needs to know about trees. A
member's parameters carry its name as a prefix (``a/lora_A``), a node's own tensors the node's number
(``@0/keys``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ...errors import Unsupported
from ..core.base import (
    Forward,
    Method,
    NormalForm,
    Overrides,
    Shared,
    Storage,
    Traits,
    amount,
    fold,
    resolve_configs,
    run,
)
from ..core.config import SiteConfig
from ..core.layouts import LINEAR
from ..core.operators import Array, Dense
from ..core.routers import MASKS
from ..core.site import Params, Site
from .base import Folded, Folding, Leaf, NodeKind, NodePart, Transform, Tree, as_form, part_of
from .registry import NODES

NAME = "composed"
"""The name of this method in the manifest of a composed pack."""
_LINEAR, _ROUTED = (*LINEAR, "embedding"), LINEAR
_WIDE = 720720
"""A width that all block sizes divide, for naming parameters before any width is known."""


class Spot(NamedTuple):
    """A node or a leaf (``member``) at its position in a tree; ``prefix`` begins the names of the node's own
    tensors.
    """

    member: str | None
    kind: NodeKind | None
    settings: Any
    children: tuple[Spot, ...]
    prefix: str
    members: frozenset[str]

    def present(self, names: Mapping[str, Any]) -> int:
        """Returns how many children have a member among ``names`` in their subtree."""
        return sum(not child.members.isdisjoint(names) for child in self.children)

    def every(self) -> list[Spot]:
        """Returns all nodes of the subtree, each before its children."""
        return (
            [] if self.kind is None else [self, *(spot for child in self.children for spot in child.every())]
        )


@dataclass(frozen=True, kw_only=True)
class Composed(SiteConfig):
    """The configs of the members that change one site, by member name. Each composition has its own
    subclass.
    """

    members: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    methods: ClassVar[Mapping[str, Method]] = {}
    spots: ClassVar[tuple[Spot, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.members, Mapping) or not self.members.keys() <= self.methods.keys():
            raise ValueError(f"members must be among {', '.join(self.methods)}")
        if not all(isinstance(cfg, Mapping) for cfg in self.members.values()):
            raise ValueError("each member's configuration must be an object")
        if any(cfg.acts is not None for cfg in self.configs.values()):
            raise ValueError("a member that acts at some positions only cannot be part of a tree")

    @cached_property
    def configs(self) -> dict[str, Any]:
        """The members' configs as instances of their methods' config classes."""
        return {
            name: self.methods[name].config(
                **{key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
            )
            for name, cfg in self.members.items()
        }

    @property
    def frozen(self) -> frozenset[str]:
        """The parameters that are not trained: under a router all parameters of the members, otherwise those
        that the members themselves freeze.
        """
        routed, site = (
            any(spot.kind is not None and spot.kind.routes for spot in self.spots),
            Site("", _WIDE, _WIDE),
        )
        kept = {
            f"{spot.prefix}{key}"
            for spot in self.spots
            if spot.kind is not None and not spot.kind.trained and spot.kind.tensors
            for key in spot.kind.tensors(spot.settings, 1, site)
        }
        for name, cfg in self.configs.items():
            method = self.methods[name]
            member_params = method.shapes(cfg, site) if routed else cfg.frozen | set(method.traits.frozen)
            kept |= {f"{name}/{key}" for key in member_params}
        return frozenset(kept)


def compose_method(tree: Tree, methods: Mapping[str, Method], composition: Any = None) -> Method:
    """Builds the method of a tree over members. ``methods`` maps each member to its method; ``composition``
    is what a manifest says about the tree.

    Raises:
        Unsupported: a member cannot be part of a tree, or not under its router; the error names the member,
            the node and a remedy.
    """
    spot = _number(tree, [0])
    spots = tuple(spot.every())
    routers = _routers(spots)
    _require_outermost(routers)
    linear = _require_members(methods, routers)
    traits_by_member = {name: methods[name].traits for name in methods}
    of_tree = {"methods": dict(methods), "spots": spots, "composition": composition}
    config = type("Composed", (Composed,), {**of_tree, "__doc__": Composed.__doc__})
    sharing = [node for node in spots if node.kind is not None and node.kind.shared is not None]
    layers = _ROUTED if routers or not linear else _LINEAR
    overrides: Overrides = {"refuse": partial(_refuse, routers)}
    if not linear:
        overrides |= {"forward": partial(_forward, spot, methods), "fold": partial(_fold, spot, methods)}
    if sharing:
        overrides["first_pass"] = partial(_first_pass, sharing)
    return Method(
        name=NAME,
        summary="several adapters under a tree of composition",
        paper="",
        config=config,
        traits=Traits(
            additive=linear,
            identity_at_init=False,
            row_separable=all(traits.row_separable for traits in traits_by_member.values()),
            low_rank=linear and not routers and all(traits.low_rank for traits in traits_by_member.values()),
            reads_weight=not linear,
            quantizable=not routers and all(traits.quantizable for traits in traits_by_member.values()),
            layers=tuple(
                kind for kind in layers if any(kind in traits.layers for traits in traits_by_member.values())
            ),
        ),
        shapes=partial(_shapes, spots, methods),
        init=_no_init,
        normal_form=partial(_as_form if linear else _densely, spot, methods),
        examples=(),
        storage=Storage(
            expanded_size=partial(_expanded_size, methods),
            constants=partial(_constants, methods)
            if any(method.storage.constants for method in methods.values())
            else None,
            resolve=partial(_resolve, methods)
            if any(method.storage.resolve for method in methods.values())
            else None,
            shared=Shared(partial(_shared_shapes, sharing), _no_init) if sharing else None,
        ),
        overrides=overrides,
    )


def _refuse(routers: Sequence[Spot], stage: str) -> str:
    """Returns why the routers of a tree cannot do a stage (``refuse`` of :class:`Overrides`)."""
    reasons = []
    for kind in (router.kind for router in routers if router.kind is not None):
        if stage == "fold":
            reasons.append(f"the node '{kind.name}' cannot be folded: {kind.unfoldable}")
        elif stage == "graph" and kind.torch_only:
            reasons.append(f"the node '{kind.name}' has no form in a graph: {kind.torch_only}")
        elif stage == "cache" and kind.one_pass:
            reasons.append(f"the node '{kind.name}' reads all tokens of a row")
    return "; ".join(dict.fromkeys(reasons))


def make_own(method: Method, cfg: Any, params: Params, site: Site, seed: int = 0) -> dict[str, np.ndarray]:
    """Computes the nodes' own tensors at a site from the members' parameters there, when a tree is composed.

    Random numbers depend only on ``seed`` and the site's path, not on the sites before it.
    """
    spots, methods = method.config.spots, method.config.methods
    # Seeding with the path makes the values independent of the order of the sites.
    rng = np.random.default_rng([seed, *site.path.encode()])
    values: dict[str, np.ndarray] = {}
    for spot in reversed(spots):  # children before their parents
        child_parts = (
            []
            if spot.kind.made is None
            else [_part(child, methods, cfg, params, site) for child in spot.children]
        )
        if parts := [part for part in child_parts if part is not None]:
            values |= {
                f"{spot.prefix}{key}": value
                for key, value in spot.kind.made(spot.settings, parts, rng).items()
            }
    return values


def is_random(method: Method) -> bool:
    """Whether a node's tensors may start from random numbers, because they are trained."""
    return bool(method.storage.shared) or any(spot.kind.trained for spot in method.config.spots)


def derived_prefixes(method: Method) -> frozenset[str]:
    """Returns the name prefixes of the node tensors that are computed from the members."""
    return frozenset(spot.prefix for spot in method.config.spots if spot.kind.derived)


def _number(tree: Tree, counter: list[int]) -> Spot:
    if isinstance(tree, Leaf):
        return Spot(tree.member, None, None, (), "", frozenset({tree.member}))
    prefix = f"@{counter[0]}/"
    counter[0] += 1
    children = tuple(_number(child, counter) for child in tree.children)
    return Spot(
        None,
        NODES[tree.kind],
        tree.settings,
        children,
        prefix,
        frozenset().union(*(child.members for child in children)),
    )


def _routers(spots: Sequence[Spot]) -> list[Spot]:
    return [spot for spot in spots if spot.kind is not None and spot.kind.routes]


def _require_outermost(routers: Sequence[Spot]) -> None:
    for outer in routers:
        for child in outer.children:
            if inner := _routers(child.every()):
                kinds = [spot.kind.name for spot in (outer, inner[0]) if spot.kind is not None]
                raise Unsupported(
                    "an expert of a router is a change of low rank, without another router inside",
                    found=f"'{kinds[1]}' below '{kinds[0]}'",
                    remedy="put the router outermost, or the other next to it in a sum",
                )


def _require_members(methods: Mapping[str, Method], routers: Sequence[Spot]) -> bool:
    """Checks that every member can be part of the tree; returns whether all are purely additive, so that the
    tree has one normal form.
    """
    for name, method in methods.items():
        if method.kind != "weight":
            raise Unsupported(
                f"members act on layers, and one of the method '{method.name}' does not",
                where=name,
                found=method.kind,
                expected="weight",
                remedy="leave it out of the tree, and make it active together with the composed pack",
            )
        if (
            method.storage.shared is not None
            or method.traits.exclusive
            or not set(method.traits.layers) & set(_LINEAR)
        ):
            raise Unsupported(
                f"a member of the method '{method.name}' cannot be part of a tree",
                where=name,
                found="its sites share tensors" if method.storage.shared is not None else "it acts alone",
                remedy="leave it out of the tree, or merge it",
            )
    added = {
        name: method.traits.additive and not method.traits.reads_weight for name, method in methods.items()
    }
    if routers and (
        wrong := [name for name, method in methods.items() if not (added[name] and method.traits.low_rank)]
    ):
        names = ", ".join(f"{name} ({methods[name].name})" for name in wrong)
        kinds = ", ".join(f"'{spot.kind.name}'" for spot in routers if spot.kind is not None)
        raise Unsupported(
            f"a tree with a router ({kinds}) takes members of low rank that are added to the layer",
            found=names,
            expected="LoRA and its kind",
            remedy="leave them out, or combine them by sum, parallel or stack",
        )
    return all(added.values())


def _no_init(*_: Any) -> dict[str, Any]:
    raise Unsupported("a composed adapter is made from packs", remedy="use compose with a tree")


def _params_of(params: Params, prefix: str) -> dict[str, Array]:
    return {key[len(prefix) :]: value for key, value in params.items() if key.startswith(prefix)}


def _shapes(
    spots: Sequence[Spot], methods: Mapping[str, Method], cfg: Composed, site: Site
) -> dict[str, tuple[int, ...]]:
    shapes = {
        f"{name}/{key}": shape
        for name, config in cfg.configs.items()
        for key, shape in methods[name].shapes(config, site).items()
    }
    for spot in spots:
        if spot.kind is not None and spot.kind.tensors is not None and (count := spot.present(cfg.configs)):
            shapes |= {
                f"{spot.prefix}{key}": shape
                for key, shape in spot.kind.tensors(spot.settings, count, site).items()
            }
    return shapes


def _part(
    spot: Spot, methods: Mapping[str, Method], cfg: Composed, params: Params, site: Site
) -> NodePart | None:
    """Returns what a subtree adds at a site, or None if none of its members changes the site."""
    if spot.members.isdisjoint(cfg.configs):
        return None
    if spot.member is not None or spot.kind is None:
        name = str(spot.member)
        form = methods[name].normal_form(cfg.configs[name], _params_of(params, f"{name}/"), site)
        return part_of(form, f"{site.path}, member '{name}'")
    parts = [_part(child, methods, cfg, params, site) for child in spot.children]
    masks = {key: params[key] for key in MASKS if spot.kind.one_pass and key in params}
    return spot.kind.join(spot.settings, parts, {**_params_of(params, spot.prefix), **masks})


def _as_form(
    spot: Spot, methods: Mapping[str, Method], cfg: Composed, params: Params, site: Site
) -> NormalForm:
    return as_form(_part(spot, methods, cfg, params, site))


def _densely(
    spot: Spot, methods: Mapping[str, Method], cfg: Composed, params: Params, site: Site
) -> NormalForm:
    """Returns a dense normal form: members that are not additive have none together, but their folded change
    does.
    """
    weight, bias = site.weight, site.base_bias
    folded, moved = _fold(spot, methods, cfg, params, site, weight, bias, slice(0, site.out_features))
    shift = None if moved is bias or moved is None else moved if bias is None else moved - bias
    return NormalForm(down=Dense(folded - weight), shift=shift)


def _forward(
    spot: Spot,
    methods: Mapping[str, Method],
    cfg: Composed,
    params: Params,
    site: Site,
    base: Forward,
    x: Array,
    drop: Forward,
) -> Array:
    def transform(node: Spot) -> Transform:
        if node.members.isdisjoint(cfg.configs):
            return lambda before: before
        if node.kind is not None and node.kind.evaluate is not None:
            return partial(node.kind.evaluate, node.settings, [transform(child) for child in node.children])
        name = str(node.member)
        member_params = _params_of(params, f"{name}/")
        return lambda before: (
            lambda value: run(methods[name], cfg.configs[name], member_params, site, before, value, drop)
        )

    return transform(spot)(base)(x)


def _fold(
    spot: Spot,
    methods: Mapping[str, Method],
    cfg: Composed,
    params: Params,
    site: Site,
    weight: Array,
    bias: Array | None,
    rows: slice,
) -> Folded:
    def folding(node: Spot) -> Folding:
        if node.members.isdisjoint(cfg.configs):
            return lambda start: start
        if node.kind is not None and node.kind.fold is not None:
            return partial(node.kind.fold, node.settings, [folding(child) for child in node.children])
        name = str(node.member)
        member_params = _params_of(params, f"{name}/")
        return lambda start: fold(
            methods[name], cfg.configs[name], member_params, site, start[0], start[1], rows
        )

    return folding(spot)((weight, bias))


def _constants(methods: Mapping[str, Method], cfg: Composed, site: Site) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for name, member_cfg in cfg.configs.items():
        if (constants := methods[name].storage.constants) is not None:
            values |= {f"{name}/{key}": value for key, value in constants(member_cfg, site).items()}
    return values


def _expanded_size(methods: Mapping[str, Method], cfg: Composed, site: Site) -> int:
    return sum(amount(methods[name], member_cfg, site) for name, member_cfg in cfg.configs.items())


def _resolve(
    methods: Mapping[str, Method], configs: Sequence[Composed], sites: Sequence[Site]
) -> list[Composed]:
    """Resolves each member's configs over the sites that it changes."""
    members_by_site: list[dict[str, Any]] = [dict(cfg.members) for cfg in configs]
    for name, method in methods.items():
        if method.storage.resolve is not None:
            there = [number for number, cfg in enumerate(configs) if name in cfg.configs]
            resolved = resolve_configs(
                method,
                [configs[number].configs[name] for number in there],
                [sites[number] for number in there],
            )
            for number, member_cfg in zip(there, resolved, strict=True):
                members_by_site[number][name] = pack_config(member_cfg)
    return [type(cfg)(members=members) for cfg, members in zip(configs, members_by_site, strict=True)]


def pack_config(cfg: Any) -> dict[str, Any]:
    """Returns a member's config as the manifest stores it."""
    return {
        key: value
        for key, value in vars(cfg).items()
        if key in cfg.__dataclass_fields__
        and cfg.__dataclass_fields__[key].metadata.get("packed", True)
        and value != {}
    }


def _shared_shapes(
    sharing: Sequence[Spot], cfg: Composed, sites: Sequence[Site]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for spot in sharing:
        assert spot.kind is not None and spot.kind.shared is not None
        own_shapes = spot.kind.shared(spot.settings, len(spot.children), len(sites))
        shapes |= {f"{spot.prefix}{key}": shape for key, shape in own_shapes.items()}
    return shapes


def _first_pass(
    sharing: Sequence[Spot], shared: Params, hidden: Array, layer: int, layers: int
) -> dict[str, Array]:
    """Computes the experts' weights at one of the adapted layers, as further parameters of that layer."""
    weights: dict[str, Array] = {}
    for spot in sharing:
        weigh: Callable[..., Array] | None = spot.kind.weigh if spot.kind is not None else None
        assert weigh is not None
        weights[f"{spot.prefix}weights"] = weigh(
            spot.settings, _params_of(shared, spot.prefix), hidden, layer, layers
        )
    return weights
