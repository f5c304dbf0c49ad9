"""Checks that every group has the tensors of its method, and the scale and rank of its configuration.
AP401-AP408, AP501-AP502.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ....adapter_methods import PROMPT, Arrays, check_shapes, shapes_of
from ....errors import AdapterpackError, FormatError
from ....io import TENSORS
from ....manifest import manifest as m
from ... import SHARED
from ...expansion_limit import require_limit
from ...pack import site_of
from .context import Subject, group_pointer, quantized_numbers, tensor_pointer
from .finding import Finding, check_rule

TWICE = check_rule("AP401")
NO_GROUP = check_rule("AP402")
SHAPES = check_rule("AP403")
EXTRA = check_rule("AP404")
KIND = check_rule("AP405")
RANK_LARGE = check_rule("AP406")
POSITIONS = check_rule("AP407")
BOUNDED = check_rule("AP408")
SCALE = check_rule("AP501")
RANK = check_rule("AP502")
_UNKNOWN = 1 << 31
"""Stands for a width that the pack does not contain; wider than any layer."""


def roles(s: Subject) -> Iterator[Finding]:
    """AP401-AP406: groups, their tensors, kinds and ranks."""
    yield from _feature(s)
    paths = {group.path for group in s.manifest.groups}
    if len(paths) != len(s.manifest.groups):
        yield TWICE.at("groups", "two groups have the same path", pointer="/groups")
    for name, entry in s.budget.over(s.manifest.tensors.items(), "the groups of the tensors"):
        if entry.group not in paths or entry.file != TENSORS:
            yield NO_GROUP.at(
                name, "the tensor belongs to no group, or to another file", pointer=tensor_pointer(name)
            )
    coded = quantized_numbers(s.manifest)
    for number, group in s.budget.over(enumerate(s.manifest.groups), "the shapes of the sites"):
        s.require_memory(8 * coded[group.path], "the shapes of the sites")
        pointer = group_pointer(number)
        params = s.pack.params(group.path)
        if group.role != "adapter":
            if not params:
                yield SHAPES.at(group.path, "a module without tensors", pointer=pointer)
            if group.role == "shared":
                yield from _shared(s, group, params, pointer)
            continue
        yield from _adapter(s, group, params, pointer)
    if SHARED not in paths:
        yield from _shared_missing(s)


def _feature(s: Subject) -> Iterator[Finding]:
    """Checks that must_understand names the use of several methods, so that a reader that supports only one
    method per pack refuses it.
    """
    if m.METHODS in s.manifest.must_understand and all(group.method is None for group in s.manifest.groups):
        yield KIND.at(
            "must_understand",
            f"it names '{m.METHODS}', and no site has a method of its own",
            pointer="/must_understand",
        )
    for number, group in s.budget.over(enumerate(s.manifest.groups), "the methods of the sites"):
        if group.method is None:
            continue
        if group.role != "adapter" or group.method.type == s.manifest.method.type:
            yield KIND.at(
                group.path,
                "only an adapted site has a method of its own, which is not the pack's",
                pointer=group_pointer(number),
            )
        elif m.METHODS not in s.manifest.must_understand:
            yield KIND.at(
                group.path,
                f"a site has a method of its own, and must_understand does not name '{m.METHODS}'",
                pointer=group_pointer(number),
            )
        elif s.pack.method.config.composition is not None:
            yield KIND.at(
                group.path,
                "a site of a composed pack has a method of its own, which is no part of the tree",
                pointer=group_pointer(number),
            )
        elif s.pack.method_of(group).kind != s.pack.method.kind:
            yield KIND.at(
                group.path,
                f"the method {group.method.type} is of another kind than the pack's",
                pointer=group_pointer(number),
            )
        elif s.pack.method_of(group).storage.shared is not None:
            yield KIND.at(
                group.path,
                f"the method {group.method.type} shares tensors between sites, which only a pack's own "
                "method can",
                pointer=group_pointer(number),
            )


def _adapter(s: Subject, group: m.Group, params: Arrays, pointer: str) -> Iterator[Finding]:
    """Checks one adapted site: its kind, its tensors, its rank."""
    method = s.pack.method_of(group)
    layers = method.traits.layers
    if group.kind not in layers:
        yield KIND.at(
            group.path,
            f"the method has no sites of kind '{group.kind}', only {', '.join(layers)}",
            pointer=pointer,
        )
        return
    if (group.kind == "prompt") != (group.path == PROMPT):
        yield KIND.at(
            group.path, f"a prompt has the one site '{PROMPT}', and no other kind has it", pointer=pointer
        )
        return
    try:
        cfg = s.pack.config_at(group)
        check_shapes(method, cfg, s.pack.site(group), params, s.folder.name)
    except AdapterpackError as error:
        yield SHAPES.at(
            group.path,
            error.what + (f": expected {error.expected}, found {error.found}" if error.expected else ""),
            pointer=pointer,
        )
        return
    if extra := sorted(set(params) - set(method.shapes(cfg, s.pack.site(group)))):
        yield EXTRA.at(
            group.path, f"a tensor that the method does not have: {', '.join(extra)}", pointer=pointer
        )
    narrow = min(group.in_features or _UNKNOWN, group.out_features or _UNKNOWN)
    if method.traits.low_rank and (cfg.rank or 0) > narrow:
        yield RANK_LARGE.at(
            group.path,
            f"rank {cfg.rank} at a site of {group.out_features} x {group.in_features}",
            pointer=pointer,
        )


def _primary_groups(s: Subject) -> list[m.Group]:
    """Returns the sites of the pack's own method, the only method that may share tensors between sites."""
    return [group for group in s.manifest.adapter_groups if group.method is None]


def _shared_missing(s: Subject) -> Iterator[Finding]:
    """Checks that the shared tensors have a group, if the method needs any."""
    sites = _primary_groups(s)
    if s.pack.method.storage.shared is None or not sites:
        return
    try:
        missing = s.pack.method.storage.shared.shapes(
            s.pack.config_at(sites[0]), [site_of(group) for group in sites]
        )
    except AdapterpackError:  # the config is not usable, which its own finding says
        return
    if missing:
        yield SHAPES.at(
            SHARED, f"what all sites share is not there: {', '.join(sorted(missing))}", pointer="/groups"
        )


def _shared(s: Subject, group: m.Group, params: Arrays, pointer: str) -> Iterator[Finding]:
    """Checks that the shared tensors are those that the method declares for all sites together."""
    adapters = _primary_groups(s)
    if group.path != SHARED or s.pack.method.storage.shared is None or not adapters:
        yield EXTRA.at(group.path, "the method shares nothing between sites", pointer=pointer)
        return
    try:
        expected = s.pack.method.storage.shared.shapes(
            s.pack.config_at(adapters[0]), [*map(site_of, adapters)]
        )
    except AdapterpackError as error:
        yield SHAPES.at(group.path, error.what, pointer=pointer)
        return
    shapes = shapes_of(params)
    if shapes != expected:
        yield SHAPES.at(group.path, f"expected {expected}, found {shapes}", pointer=pointer)


def bounded(s: Subject) -> Iterator[Finding]:
    """AP408: the methods do not compute far more than the pack stores."""
    groups = s.manifest.adapter_groups
    sites = ((s.pack.method_of(group), s.pack.config_at(group), s.pack.site(group)) for group in groups)
    try:
        require_limit(s.budget.over(sites, "what the methods make"), s.manifest.tensors, s.folder.name)
    except FormatError as error:
        yield BOUNDED.at(
            "groups", f"{error.what}: expected {error.expected}, found {error.found}", pointer="/groups"
        )


def positions(s: Subject) -> Iterator[Finding]:
    """AP407: all sites act at the same positions."""
    rules = set()
    for group in s.budget.over(s.manifest.groups, "the positions that the sites act at"):
        if group.role == "adapter":
            rules.add(s.pack.config_at(group).acts)
    if len(rules) > 1:
        listed = "; ".join(sorted(str(rule or "all") for rule in rules))[:200]
        yield POSITIONS.at("groups", f"the sites act at different positions: {listed}", pointer="/groups")


def scales(s: Subject) -> Iterator[Finding]:
    """AP501-AP502: scales and ranks match the configuration."""
    for number, group in s.budget.over(enumerate(s.manifest.groups), "the scales of the sites"):
        if group.role != "adapter":
            continue
        cfg = s.pack.config_at(group)
        if group.scale is None or not np.isclose(group.scale, cfg.scale, rtol=1e-9, atol=0):
            yield SCALE.at(
                group.path,
                f"the scale is {group.scale}, the configuration gives {cfg.scale}",
                pointer=group_pointer(number),
            )
        if group.rank != cfg.rank:
            yield RANK.at(
                group.path,
                f"the rank is {group.rank}, the configuration gives {cfg.rank}",
                pointer=group_pointer(number),
            )
