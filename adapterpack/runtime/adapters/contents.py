"""Compares what a bundle's slots are filled with, in its bank or its adapter files, with the packs that its
manifest names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...bundle.manifest import MappedSite
from ...errors import FormatError
from ...pack.pack import Pack
from ...slots.values import PEFT_NAMES, Values, group_slots, pack_values
from .slot_values import SlotValues

_NEAR = 5e-3
"""How far numbers may lie apart, as a share of the largest: other machines round products otherwise; other
adapters are farther away.
"""


def require_contents(
    expected: Values, found: Mapping[str, np.ndarray], where: Path, name: str | None
) -> None:
    """Checks that slots are filled with an adapter's values; ``name`` is the adapter, or None for the base.

    Raises:
        FormatError: a slot holds something else.
    """
    for slot, value in expected.items():
        there = found.get(slot)
        if there is None or there.shape != value.shape or not _near(there, value):
            raise FormatError(
                "the graph's slots do not hold the adapter that the manifest names"
                if name
                else "the graph's slots change the base, where no adapter is named",
                where=f"{where}, {slot}",
                expected=f"the values of {name!r}" if name else "values that change nothing",
                found="other values"
                if there is not None and there.shape == value.shape
                else "none of this shape",
                remedy="do not use this bundle; export it again",
            )


def require_base_slots(values: SlotValues) -> None:
    """Checks that a bank as it was exported changes nothing of the base where no adapter is named.

    Raises:
        FormatError: it does.
    """
    base = {name: array[0] for name, array in values.exported_bank().items()}
    require_contents(values.pad({}), base, values.folder, None)


def require_pack_slots(values: SlotValues, pack: Pack) -> None:
    """Checks that a bank as it was exported holds a pack of the bundle in the slot of its name.

    Raises:
        FormatError: the slot holds something else.
    """
    exported, slot = values.exported_bank(), values.bundle.adapter(pack.name).slot or 0
    wide = values.pad(values.of(pack))
    require_contents(wide, {name: array[slot] for name, array in exported.items()}, values.folder, pack.name)


def require_file_contents(
    pack: Pack,
    sites: Mapping[str, MappedSite],
    files: Mapping[str, Path],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Checks that the adapter files of a pack, by the part of the graph, hold its values; those are made
    without the weights of the base.

    Raises:
        FormatError: one holds something else.
    """
    values = pack_values(pack, None, sites)
    for part, path in files.items():
        here = {name: site for name, site in sites.items() if site.part == part}
        own = {name: array for name, array in values.items() if name.rpartition(".")[0] in here}
        require_contents(group_slots(own, here), _own_names(arrays[part]), path, pack.name)


def _own_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by our names of slots, where another product's graph names them otherwise."""
    ours = {theirs: field for field, theirs in PEFT_NAMES.items()}
    named = {}
    for name, array in arrays.items():
        ending = next((ending for ending in ours if name.endswith(f".{ending}")), "")
        named[f"{name.removesuffix(ending)}{ours.get(ending, '')}"] = array
    return named


def _near(one: np.ndarray, two: np.ndarray) -> bool:
    if np.array_equal(one, two):
        return True
    one, two = one.astype(np.float32), two.astype(np.float32)
    size = float(np.abs(two).max(initial=0.0))
    return bool(np.abs(one - two).max(initial=0.0) <= _NEAR * size)  # NaN is near nothing
