"""The slots of the engine's graph: their shapes for given ranks, and how an adapter's values are written into
them.

A free axis (a rank, a number of experts, tokens or labels) is as long as the widest adapter of a batch needs.
Slots that share an axis have one length for it: ``down`` and ``up`` of a site, and those of siblings such as
q, k and v that share one product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...bundle import Bundle, MappedSite, part_ranks
from ...errors import BaseMismatch, Unsupported
from ...slots import FIELDS, FIXED, LABELS, LEAST, RANK, Values, is_looked_up, neutral, widths
from ...tasks import MAIN, Arrays
from ..ort import OrtModel


class Axis(NamedTuple):
    """A free axis: its name, and the path of the site or group of sites to which it belongs."""

    path: str
    name: str


Extents = Mapping[Axis, int]
"""Free axis -> its length; an axis that is missing has its least length."""


class Slot(NamedTuple):
    """One input of the graph. ``axes`` are fixed lengths or free axes. Along the axis ``split``, ``parts``
    blocks of that length follow each other, one for each member of a group.
    """

    axes: tuple[int | Axis, ...]
    split: int
    parts: int
    dtype: str
    neutral: np.ndarray
    table: bool = False
    """Whether the graph looks it up by adapter and token: ``[adapters, ...]``. Other slots are ``[rows,
    ...]``.
    """
    held: bool = False
    """Whether the graph's operator for LoRAs has it in place of an input."""

    @property
    def by_row(self) -> bool:
        """Whether the graph takes a row's values of it as an input."""
        return not (self.table or self.held)

    def shape(self, extents: Extents, least: Extents) -> tuple[int, ...]:
        """Returns the shape of one adapter's values for these lengths."""
        lengths = [
            axis if isinstance(axis, int) else extents.get(axis, least.get(axis, 0)) for axis in self.axes
        ]
        lengths[self.split] *= self.parts
        return tuple(lengths)

    def fill(self, target: np.ndarray, array: np.ndarray | None) -> None:
        """Writes an adapter's values into memory of this slot's shape or a larger one, and neutral values,
        which change nothing, around them.
        """
        target[...] = self.neutral
        if array is not None:
            own = self._apart(array)
            self._apart(target)[tuple(slice(0, length) for length in own.shape)] = own

    def _apart(self, array: np.ndarray) -> np.ndarray:
        """Reshapes an array so that the parts have an axis of their own."""
        at = self.split
        return array.reshape(
            *array.shape[:at], self.parts, array.shape[at] // self.parts, *array.shape[at + 1 :]
        )


class JoinedValue(NamedTuple):
    """The values of a slot that siblings share, held as each sibling's own: an array of this ``shape``, zero
    but for the ``parts`` at their places.
    """

    shape: tuple[int, ...]
    parts: Sequence[tuple[tuple[slice, ...], np.ndarray]]

    @property
    def nbytes(self) -> int:
        """The bytes of the parts."""
        return sum(part.nbytes for _, part in self.parts)

    def array(self) -> np.ndarray:
        """Returns the whole array, a new one."""
        made = np.zeros(self.shape, self.parts[0][1].dtype)
        for place, part in self.parts:
            made[place] = part
        return made


def own_memory(array: np.ndarray) -> np.ndarray:
    """Returns an array, or a copy if it is a view that keeps more than itself in memory."""
    root: Any = array
    while isinstance(root, np.ndarray) and root.base is not None:
        root = root.base
    return array if isinstance(root, np.ndarray) and root.nbytes <= array.nbytes else array.copy("K")


def _mismatch(where: str, expected: object, found: object) -> BaseMismatch:
    return BaseMismatch(
        "the adapter was made for a layer of another width",
        where=where,
        expected=expected,
        found=found,
        remedy="export a bundle of the base that the adapter was made for",
    )


class SlotLayout:
    """The slots of a bundle's decoder with its ``graph``. ``heads`` are the base model's heads, for adapters
    without one; ``base`` are the values of a row without an adapter.
    """

    def __init__(self, bundle: Bundle, graph: OrtModel, heads: Values) -> None:
        self.lora, self.halves, inputs = graph.lora, graph.halves, graph.inputs
        self.sites = {
            path: site
            for path, site in bundle.sites.items()
            if site.part == MAIN and (site.fields or site.members)
        }
        self.heads = heads
        self.groups = {path: site for path, site in self.sites.items() if site.members}
        self.joined = {
            path: int(inputs[name].shape[2]) for path in self.groups if (name := f"{path}.up") in inputs
        }
        """Groups whose members' ``up`` factors form one block-diagonal matrix -> the number of its
        columns.
        """
        self.least: dict[Axis, int] = {}
        self.slots: dict[str, Slot] = {}
        owners = {member: path for path, site in self.groups.items() for member in site.members}
        for path, site in self.sites.items():
            for field in site.fields:
                if not (field == "up" and owners.get(path) in self.joined):
                    self._add(path, site, field, owners.get(path, path))
        for path, width in self.joined.items():
            group = self.groups[path]
            self.slots[f"{path}.up"] = Slot(
                (Axis(path, RANK), width),
                0,
                len(group.members),
                group.dtype,
                neutral("up", group.dtype),
                held=path in self.lora,
            )
        self.shares = not any(site.flat and site.positional for site in self.sites.values())
        """Whether rows with one adapter can share its values. They cannot at a flat site (tokens without a
        row axis, as in a mixture of experts) that masks positions by row.
        """
        # Last, because own() reads the fields above.
        self.base = self.own({})

    def _add(self, path: str, site: MappedSite, field: str, owner: str) -> None:
        fixed, axes = widths(site), list[int | Axis]()
        for axis in FIELDS[field].axes:
            if axis in FIXED:
                axes.append(fixed[axis])
                continue
            axes.append(Axis(owner if axis == RANK else path, axis))
            least = site.labels or site.out_features if axis == LABELS else LEAST.get(axis, 0)
            self.least[axes[-1]] = least  # type: ignore[index]
        self.slots[f"{path}.{field}"] = Slot(
            tuple(axes),
            len(axes) - 1,
            max(len(site.members), 1),
            site.dtype,
            neutral(field, site.dtype),
            is_looked_up(field, site),
            path in self.lora and field in ("down", "up"),
        )

    def own(self, values: Values) -> dict[str, np.ndarray | JoinedValue]:
        """Groups one adapter's values by slot, and adds the base's heads if the adapter has none. Slots that
        it leaves neutral are missing.

        Raises:
            Unsupported: the graph has no slot for a part of the adapter.
            BaseMismatch: the adapter was made for a layer of another width.
        """
        result: dict[str, np.ndarray | JoinedValue] = dict(values)
        for path, group in self.groups.items():
            downs = {one: result.pop(f"{one}.down") for one in group.members if f"{one}.down" in result}
            if downs:
                wide = max(down.shape[1] for down in downs.values())
                result[f"{path}.down"] = self._join(group, wide, downs, 1, group.in_features)
            elif f"{path}.down" in result:  # of a bank, where they are joined already
                wide = result[f"{path}.down"].shape[1] // len(group.members)
            if path in self.joined and f"{path}.down" in result:
                ups = {one: result.pop(f"{one}.up") for one in group.members if f"{one}.up" in result}
                result[f"{path}.up"] = self._join(group, wide, ups, 0, self.joined[path])
        for name, array in result.items():
            self._require_fit(name, array.shape)
        replaced = {name.rpartition(".")[0] for name in result if name.endswith(".head")}
        return {
            **{name: array for name, array in self.heads.items() if name.rpartition(".")[0] not in replaced},
            **result,
        }

    def _join(
        self, group: MappedSite, wide: int, own: Mapping[str, Any], axis: int, other: int
    ) -> JoinedValue:
        """Joins the factors of siblings, each in the ``wide`` places of its own along the ``axis`` of the
        ranks, in an array whose other axis has the length ``other``: the ``down`` factors side by side,
        the ``up`` factors as blocks of a diagonal.
        """
        parts = []
        for number, member in enumerate(group.members):
            if (part := own.get(member)) is not None:
                site = self.sites[member]
                length, at = (site.out_features, site.at) if axis == 0 else (other, 0)
                if part.shape[1 - axis] != length:
                    raise _mismatch(member, length, part.shape)
                places = slice(number * wide, number * wide + part.shape[axis]), slice(at, at + length)
                parts.append((places if axis == 0 else places[::-1], part))
        whole = wide * len(group.members), other
        return JoinedValue(whole if axis == 0 else whole[::-1], parts)

    def _require_fit(self, name: str, shape: tuple[int, ...]) -> None:
        slot = self.slots.get(name)
        if slot is None:
            raise Unsupported(
                "the graph has no slot for a part of this adapter",
                found=name,
                remedy="export the bundle again with this adapter among the packs",
            )
        if len(shape) != len(slot.axes) or any(
            isinstance(axis, int) and axis != length for axis, length in zip(slot.axes, shape, strict=True)
        ):
            raise _mismatch(name, slot.axes, shape)

    def extents(self, values: Mapping[str, np.ndarray | JoinedValue]) -> dict[Axis, int]:
        """Returns the lengths of the free axes in an adapter's values."""
        longest: dict[Axis, int] = {}
        for name, array in values.items():
            slot = self.slots[name]
            for place, axis in enumerate(slot.axes):
                if not isinstance(axis, int):
                    length = array.shape[place] // (slot.parts if place == slot.split else 1)
                    longest[axis] = max(longest.get(axis, 0), length)
        return longest

    def widest(self, extents: Iterable[Extents]) -> dict[Axis, int]:
        """Returns, for each free axis, the largest of these lengths."""
        result = dict(self.least)
        for one in extents:
            for axis, length in one.items():
                result[axis] = max(result.get(axis, 0), length)
        return result

    def ranks(self, extents: Extents) -> Arrays:
        """Returns the widths at which the graph splits each shared slot, by graph input."""
        return {
            part_ranks(path): np.full(len(group.members), extents.get(Axis(path, RANK), 0), np.int64)
            for path, group in self.groups.items()
            if path not in self.joined
        }
