"""The slots of the engine's graph: the shape of each for given ranks, and how an adapter's values are put into it.

A free axis (a rank, a number of experts, of tokens, of labels) is as long as the widest adapter of a batch needs it. Slots that share an
axis have one extent for it: ``down`` and ``up`` of a site, and the ``down`` of several siblings with their ``up``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ...bundle.decoder_graph import part_ranks
from ...bundle.manifest import Bundle, MappedSite
from ...slots.fields import FIELDS, FIXED, LABELS, LEAST, RANK, neutral, widths
from ...slots.values import Values, grouped
from ...tasks.task import MAIN

Axis = tuple[str, str]
"""A free axis: the path of the site, or of the group of sites, that has it, and its name."""
Extents = Mapping[Axis, int]
"""How long free axes are; one that is not named is as short as it can be."""


class Slot(NamedTuple):
    """One input of the graph. ``axes`` are extents, or free axes; the last one is ``parts`` times as long as its axis."""

    name: str
    axes: tuple[int | Axis, ...]
    parts: int
    dtype: str
    neutral: np.ndarray
    table: bool
    """It is looked up by adapter and token, ``[adapters, ...]``; the others are ``[rows, ...]``."""

    def shape(self, extents: Extents, least: Extents) -> tuple[int, ...]:
        """The shape of one adapter's values."""
        lengths = [axis if isinstance(axis, int) else extents.get(axis, least.get(axis, 0)) for axis in self.axes]
        return (*lengths[:-1], lengths[-1] * self.parts)


class SlotLayout:
    """The slots of the decoder's graph of a bundle. ``heads`` are the base's own heads, for adapters that have none."""

    def __init__(self, bundle: Bundle, heads: Values) -> None:
        self.sites = {path: site for path, site in bundle.sites.items() if site.part == MAIN and site.fields}
        self.heads = heads
        groups = {member: path for path, site in self.sites.items() for member in site.members}
        self.least: dict[Axis, int] = {}
        self.slots: dict[str, Slot] = {}
        for path, site in self.sites.items():
            for field in site.fields:
                self._add(path, site, field, groups)
        self.groups = {path: len(site.members) for path, site in self.sites.items() if site.members}
        self.shares = not any(site.flat and site.positional for site in self.sites.values())
        """Whether rows of one adapter can share its values: positions are those of rows, where tokens do not lie by row."""
        self.positional = any(site.positional for site in self.sites.values())

    def _add(self, path: str, site: MappedSite, field: str, groups: Mapping[str, str]) -> None:
        fixed, name = widths(site), f"{path}.{field}"
        axes: list[int | Axis] = []
        for axis in FIELDS[field].axes:
            if axis in FIXED:
                axes.append(fixed[axis])
                continue
            key = (groups.get(path, path) if axis == RANK else path, axis)
            axes.append(key)
            self.least[key] = site.labels or site.out_features if axis == LABELS else LEAST.get(axis, 0)
        self.slots[name] = Slot(name, tuple(axes), max(len(site.members), 1), site.dtype, neutral(field, site.dtype),
                                site.kind == "lookup" and field == "down")

    def own(self, values: Values) -> Values:
        """One adapter's values by slot, without those that it leaves at what changes nothing."""
        result = {name: array for name, array in grouped(values, self.sites).items() if name in self.slots}
        replaced = {name.rpartition(".")[0] for name in result if name.endswith(".head")}
        return {**{name: array for name, array in self.heads.items() if name.rpartition(".")[0] not in replaced}, **result}

    def extents(self, values: Values) -> dict[Axis, int]:
        """The lengths of the free axes that an adapter's values have."""
        found: dict[Axis, int] = {}
        for name, array in values.items():
            slot = self.slots[name]
            for place, axis in enumerate(slot.axes):
                if not isinstance(axis, int):
                    length = array.shape[place] // (slot.parts if place == len(slot.axes) - 1 else 1)
                    found[axis] = max(found.get(axis, 0), length)
        return found

    def widest(self, extents: Iterable[Extents]) -> dict[Axis, int]:
        """The lengths that have room for all of these."""
        result = dict(self.least)
        for one in extents:
            for axis, length in one.items():
                result[axis] = max(result.get(axis, 0), length)
        return result

    def fill(self, slot: Slot, target: np.ndarray, values: Values) -> None:
        """Puts an adapter's values into one slot's memory, and what changes nothing around them."""
        array = values.get(slot.name)
        target[...] = slot.neutral
        if array is None:
            return
        apart = target.reshape(*target.shape[:-1], slot.parts, -1) if slot.parts > 1 else target
        own = array.reshape(*array.shape[:-1], slot.parts, -1) if slot.parts > 1 else array
        apart[tuple(slice(0, length) for length in own.shape)] = own

    def ranks(self, extents: Extents) -> dict[str, np.ndarray]:
        """The widths of the parts of each shared slot, by input of the graph."""
        return {part_ranks(path): np.full(count, extents.get((path, RANK), 0), np.int64) for path, count in self.groups.items()}
