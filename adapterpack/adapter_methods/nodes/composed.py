"""The method of a composed pack: several member adapters under a tree that says how to combine them.

:func:`compose_method` returns an ordinary :class:`Method`, so that no other code needs to know about trees. A
member's parameters carry its name as a prefix (``a/lora_A``), a node's own tensors the node's number
(``@0/keys``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from ...errors import Unsupported
from .. import (
    LINEAR,
    MASKS,
    Array,
    Arrays,
    Dense,
    Forward,
    Method,
    NormalForm,
    Overrides,
    Params,
    Random,
    Shape,
    Shapes,
    Shared,
    Site,
    SiteConfig,
    Storage,
    Traits,
    amount,
    fold,
    from_json,
    run,
)
from .base import Folded, Folding, Leaf, NodeKind, NodePart, Transform, Tree, as_form, part_of
from .registry import NODES

T = TypeVar("T")
NAME = "composed"
"""The name of this method in the manifest of a composed pack."""
_LINEAR = (*LINEAR, "embedding")
_WIDE = 720720
"""A width that all block sizes divide, for naming parameters before any width is known."""


class Spot(NamedTuple):
    """A node at its position in a tree; ``prefix`` begins the names of its own tensors, and ``members`` are
    the members in its subtree.
    """

    kind: NodeKind
    settings: Any
    children: tuple[Spot | Leaf, ...]
    prefix: str
    members: frozenset[str]

    def present(self, names: Mapping[str, Any]) -> int:
        """Returns how many children have a member among ``names`` in their subtree."""
        return sum(not child.members.isdisjoint(names) for child in self.children)

    def every(self) -> list[Spot]:
        """Returns all nodes of the subtree, each before its children."""
        below = [child.every() for child in self.children if isinstance(child, Spot)]
        return [self, *itertools.chain.from_iterable(below)]

    def name(self, values: Mapping[str, T]) -> dict[str, T]:
        """Returns values of the node's own tensors under the tensors' full names."""
        return {f"{self.prefix}{key}": value for key, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Composed(SiteConfig):
    """The configs of the members that change one site, by member name. Each composition has its own
    subclass, with its ``tree`` and all ``spots`` in it.
    """

    members: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    methods: ClassVar[Mapping[str, Method]] = {}
    tree: ClassVar[Spot | Leaf] = Leaf("")
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
        return {name: from_json(self.methods[name].config, cfg) for name, cfg in self.members.items()}

    @property
    def present_members(self) -> Iterator[tuple[str, Method, Any]]:
        """The members that change the site: name, method and config of each."""
        return ((name, self.methods[name], cfg) for name, cfg in self.configs.items())

    @property
    def frozen(self) -> frozenset[str]:
        """The parameters that are not trained: under a router all parameters of the members, otherwise those
        that the members themselves freeze.
        """
        routed = bool(_routers(self.spots))
        site = Site("", _WIDE, _WIDE)
        kept: set[str] = set()
        for spot in self.spots:
            if spot.kind.tensors is not None and not spot.kind.trained:
                kept |= spot.name(spot.kind.tensors(spot.settings, 1, site)).keys()
        for name, method, cfg in self.present_members:
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
    root = _number(tree, itertools.count())
    spots = () if isinstance(root, Leaf) else tuple(root.every())
    routers = _routers(spots)
    _require_outermost(routers)
    linear = _require_members(methods, spots)
    traits, storages = (
        [getattr(method, group) for method in methods.values()] for group in ("traits", "storage")
    )
    of_tree = {"methods": dict(methods), "tree": root, "spots": spots, "composition": composition}
    sharing = [spot for spot in spots if spot.kind.shared is not None]
    layers = LINEAR if routers or not linear else _LINEAR
    overrides: Overrides = {"refuse": partial(_refuse, routers)}
    if not linear:
        overrides |= {"forward": _forward, "fold": _fold}
    if sharing:
        overrides["first_pass"] = partial(_first_pass, sharing)
    return Method(
        name=NAME,
        summary="several adapters under a tree of composition",
        paper="",
        config=type("Composed", (Composed,), {**of_tree, "__doc__": Composed.__doc__}),
        traits=Traits(
            additive=linear,
            identity_at_init=False,
            row_separable=all(each.row_separable for each in traits),
            low_rank=linear and not routers and all(each.low_rank for each in traits),
            reads_weight=not linear,
            quantizable=not routers and all(each.quantizable for each in traits),
            layers=tuple(kind for kind in layers if any(kind in each.layers for each in traits)),
        ),
        shapes=_shapes,
        init=_no_init,
        normal_form=_additive_form if linear else _dense_form,
        examples=(),
        storage=Storage(
            expanded_size=_expanded_size,
            constants=_constants if any(each.constants for each in storages) else None,
            resolve=_resolve if any(each.resolve for each in storages) else None,
            shared=Shared(_shared_shapes, _init_shared) if sharing else None,
        ),
        overrides=overrides,
    )


def _refuse(routers: Sequence[Spot], stage: str) -> str:
    """Returns why the routers of a tree cannot do a stage (``refuse`` of :class:`Overrides`)."""
    reasons = []
    for kind in (router.kind for router in routers):
        if stage == "fold":
            reasons.append(f"the node '{kind.name}' cannot be folded: {kind.unfoldable}")
        elif stage == "graph" and kind.torch_only:
            reasons.append(f"the node '{kind.name}' has no form in a graph: {kind.torch_only}")
        elif stage == "cache" and kind.one_pass:
            reasons.append(f"the node '{kind.name}' reads all tokens of a row")
    return "; ".join(dict.fromkeys(reasons))


def make_own(method: Method, cfg: Any, params: Params, site: Site, seed: int = 0) -> Arrays:
    """Computes the nodes' own tensors at a site from the members' parameters there, when a tree is composed.

    Random numbers depend only on ``seed`` and the site's path, not on the sites before it.
    """
    # Seeding with the path makes the values independent of the order of the sites.
    rng = np.random.default_rng([seed, *site.path.encode()])
    values: Arrays = {}
    for spot in reversed(method.config.spots):  # children before their parents
        if spot.kind.made is not None:
            parts = [_part(child, cfg, params, site) for child in spot.children]
            if present := [part for part in parts if part is not None]:
                values |= spot.name(spot.kind.made(spot.settings, present, rng))
    return values


def is_random(method: Method) -> bool:
    """Whether a node's tensors may start from random numbers, because they are trained."""
    return any(spot.kind.trained for spot in method.config.spots)


def derived_prefixes(method: Method) -> frozenset[str]:
    """Returns the name prefixes of the node tensors that are computed from the members."""
    return frozenset(spot.prefix for spot in method.config.spots if spot.kind.made and not spot.kind.trained)


def _number(tree: Tree, numbers: Iterator[int]) -> Spot | Leaf:
    if isinstance(tree, Leaf):
        return tree
    prefix = f"@{next(numbers)}/"
    children = tuple(_number(child, numbers) for child in tree.children)
    members = frozenset().union(*(child.members for child in children))
    return Spot(NODES[tree.kind], tree.settings, children, prefix, members)


def _routers(spots: Sequence[Spot]) -> list[Spot]:
    return [spot for spot in spots if spot.kind.routes]


def _require_outermost(routers: Sequence[Spot]) -> None:
    for outer in routers:
        if inner := _routers(outer.every()[1:]):
            raise Unsupported(
                "an expert of a router is a change of low rank, without another router inside",
                found=f"'{inner[0].kind.name}' below '{outer.kind.name}'",
                remedy="put the router outermost, or the other next to it in a sum",
            )


def _require_members(methods: Mapping[str, Method], spots: Sequence[Spot]) -> bool:
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
    added = {name: method.traits.independent for name, method in methods.items()}
    # A kind that cannot evaluate functions takes additive members, and a router of these those of low rank.
    joining = [spot.kind for spot in spots if spot.kind.evaluate is None]
    routed = any(kind.routes for kind in joining)
    fit = {name: added[name] and (method.traits.low_rank or not routed) for name, method in methods.items()}
    if joining and not all(fit.values()):
        wrong = ", ".join(f"{name} ({methods[name].name})" for name in fit if not fit[name])
        raise Unsupported(
            f"a tree with {'a router' if routed else 'such a node'} takes members"
            f"{' of low rank' if routed else ''} that are added to the layer",
            found=f"{wrong} below {', '.join(repr(kind.name) for kind in joining)}",
            expected="LoRA and its kind",
            remedy="leave them out, or combine them by sum, parallel or stack",
        )
    return all(added.values())


def _no_init(*_: Any) -> dict[str, Any]:
    raise Unsupported("a composed adapter is made from packs", remedy="use compose with a tree")


def _params_of(params: Params, prefix: str) -> dict[str, Array]:
    return {key[len(prefix) :]: value for key, value in params.items() if key.startswith(prefix)}


def _shapes(cfg: Composed, site: Site) -> Shapes:
    shapes = {
        f"{name}/{key}": shape
        for name, method, config in cfg.present_members
        for key, shape in method.shapes(config, site).items()
    }
    for spot in cfg.spots:
        if spot.kind.tensors is not None and (count := spot.present(cfg.configs)):
            shapes |= spot.name(spot.kind.tensors(spot.settings, count, site))
    return shapes


def _part(tree: Spot | Leaf, cfg: Composed, params: Params, site: Site) -> NodePart | None:
    """Returns what a subtree adds at a site, or None if none of its members changes the site."""
    if tree.members.isdisjoint(cfg.configs):
        return None
    if isinstance(tree, Leaf):
        name = tree.member
        form = cfg.methods[name].normal_form(cfg.configs[name], _params_of(params, f"{name}/"), site)
        return part_of(form, f"{site.path}, member '{name}'")
    parts = [_part(child, cfg, params, site) for child in tree.children]
    masks = {key: params[key] for key in MASKS if tree.kind.one_pass and key in params}
    return tree.kind.join(tree.settings, parts, {**_params_of(params, tree.prefix), **masks})


def _additive_form(cfg: Composed, params: Params, site: Site) -> NormalForm:
    return as_form(_part(cfg.tree, cfg, params, site))


def _dense_form(cfg: Composed, params: Params, site: Site) -> NormalForm:
    """Returns a dense normal form: members that are not additive have none together, but their folded change
    does.
    """
    weight, bias = site.weight, site.base_bias
    folded, moved = _fold(cfg, params, site, weight, bias, slice(0, site.out_features))
    shift = None if moved is bias or moved is None else moved if bias is None else moved - bias
    return NormalForm(down=Dense(folded - weight), shift=shift)


def _forward(cfg: Composed, params: Params, site: Site, base: Forward, x: Array, drop: Forward) -> Array:
    def transform(tree: Spot | Leaf) -> Transform:
        if tree.members.isdisjoint(cfg.configs):
            return lambda before: before
        if isinstance(tree, Spot):
            assert tree.kind.evaluate is not None  # _require_members saw to it
            return partial(tree.kind.evaluate, tree.settings, [transform(child) for child in tree.children])
        name = tree.member
        member_params = _params_of(params, f"{tree.member}/")
        return lambda before: (
            lambda value: run(cfg.methods[name], cfg.configs[name], member_params, site, before, value, drop)
        )

    return transform(cfg.tree)(base)(x)


def _fold(
    cfg: Composed, params: Params, site: Site, weight: Array, bias: Array | None, rows: slice
) -> Folded:
    def folding(tree: Spot | Leaf) -> Folding:
        if tree.members.isdisjoint(cfg.configs):
            return lambda start: start
        if isinstance(tree, Spot):
            assert tree.kind.fold is not None
            return partial(tree.kind.fold, tree.settings, [folding(child) for child in tree.children])
        name = tree.member
        member_params = _params_of(params, f"{tree.member}/")
        return lambda start: fold(cfg.methods[name], cfg.configs[name], member_params, site, *start, rows)

    return folding(cfg.tree)((weight, bias))


def _constants(cfg: Composed, site: Site) -> Arrays:
    return {
        f"{name}/{key}": value
        for name, method, config in cfg.present_members
        if method.storage.constants is not None
        for key, value in method.storage.constants(config, site).items()
    }


def _expanded_size(cfg: Composed, site: Site) -> int:
    return sum(amount(method, config, site) for _, method, config in cfg.present_members)


def _resolve(configs: Sequence[Composed], sites: Sequence[Site]) -> list[Composed]:
    """Resolves each member's configs over the sites that it changes."""
    members_by_site: list[dict[str, Any]] = [dict(cfg.members) for cfg in configs]
    for name, method in configs[0].methods.items() if configs else ():
        if method.storage.resolve is not None:
            there = [number for number, cfg in enumerate(configs) if name in cfg.configs]
            resolved = method.storage.resolve(
                [configs[number].configs[name] for number in there], [sites[number] for number in there]
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


def _shared_shapes(cfg: Composed, sites: Sequence[Site]) -> Shapes:
    shapes: dict[str, Shape] = {}
    for spot in cfg.spots:
        if spot.kind.shared is not None:
            shapes |= spot.name(spot.kind.shared(spot.settings, len(spot.children), len(sites)))
    return shapes


def _init_shared(cfg: Composed, sites: Sequence[Site], rng: Random) -> Arrays:
    values: Arrays = {}
    for spot in cfg.spots:
        if spot.kind.made_shared is not None:
            values |= spot.name(spot.kind.made_shared(spot.settings, len(spot.children), len(sites), rng))
    return values


def _first_pass(
    sharing: Sequence[Spot], shared: Params, hidden: Array, layer: int, layers: int
) -> dict[str, Array]:
    """Computes the experts' weights at one of the adapted layers, as further parameters of that layer."""
    weights: dict[str, Array] = {}
    for spot in sharing:
        assert spot.kind.weigh is not None
        own = _params_of(shared, spot.prefix)
        weights |= spot.name({"weights": spot.kind.weigh(spot.settings, own, hidden, layer, layers)})
    return weights
