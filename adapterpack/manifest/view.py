"""Looks up what a manifest refers to: the methods of a pack and their configs, without its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from msgspec.structs import replace

from ..adapter_methods import Acts, Method, get
from ..adapter_methods.core.config import from_json
from ..errors import FormatError
from . import manifest as m
from .composed_method import method_of
from .outline import Outline


@dataclass(frozen=True)
class Described:
    """A pack as its manifest describes it. ``alias`` is the name that the pack has here, if it differs from
    its own; ``kinds`` maps paths to the kinds of layers that the available base stores differently from what
    the manifest says.
    """

    manifest: m.Manifest
    alias: str | None = dataclasses.field(default=None, kw_only=True)
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict, kw_only=True)

    @property
    def outline(self) -> m.Manifest | Outline:
        """What is known before the whole manifest has been read."""
        return self.manifest

    @property
    def name(self) -> str:
        """The name of the pack here: its alias, or else its own name."""
        return self.alias or self.outline.pack.name

    @property
    def where(self) -> str:
        """The pack as errors name it."""
        return f"pack '{self.name}'"

    @property
    def method(self) -> Method:
        """The method of the pack; a group may have its own (:meth:`method_of`)."""
        return method_of(self.manifest)

    @cached_property
    def groups(self) -> tuple[m.Group, ...]:
        """The modules that the pack changes, with the kinds that they have in the available base."""
        return tuple(
            replace(group, kind=self.kinds[group.path]) if group.path in self.kinds else group
            for group in self.manifest.groups
        )

    @cached_property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Group -> parameter -> its shape."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, entry in self.manifest.tensors.items():
            shapes.setdefault(entry.group, {})[entry.param] = self.manifest.shape_of(name)
        return shapes

    def method_of(self, group: m.Group) -> Method:
        """Returns the method at one group."""
        return self.method if group.method is None else get(group.method.type)

    @property
    def methods(self) -> tuple[Method, ...]:
        """Every method in the pack, its own first."""
        return (
            self.method,
            *map(
                get,
                dict.fromkeys(
                    group.method.type for group in self.manifest.groups if group.method is not None
                ),
            ),
        )

    @cached_property
    def acts(self) -> Acts | None:
        """Which positions of a row the adapter acts on; None means all.

        Raises:
            FormatError: the sites have different rules.
        """
        rules = {self.config_at(group).acts for group in self.manifest.adapter_groups}
        if len(rules) > 1:
            raise FormatError(
                "the sites of an adapter must act at the same positions",
                where=self.where,
                found="; ".join(sorted(map(str, rules)))[:200],
            )
        return next(iter(rules), None)

    def config_at(self, group: m.Group) -> Any:
        """Returns the method's config at one group; lists in the manifest's JSON become tuples.

        Raises:
            FormatError: the manifest has a hyper-parameter that the method does not know, or a value that it
                rejects.
        """
        plain = not group.config and group.method is None
        if plain and self._common:
            return self._common[0]
        written = {**(self.manifest.config if group.method is None else {}), **group.config}
        try:
            cfg = from_json(self.method_of(group).config, written)
            _ = cfg.scale, cfg.rank  # a value of the wrong type may show only here
        except (TypeError, ValueError, ArithmeticError) as error:
            raise FormatError(
                f"the method's configuration is not usable: {error}", where=f"group {group.path}"
            ) from error
        if plain:
            self._common.append(cfg)  # frozen, and the same at every such group
        return cfg

    @cached_property
    def _common(self) -> list[Any]:
        return []
