"""Checks that the slots of a bundle, in its bank or in its adapter files, hold the packs that the manifest
names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...adapter_methods import Tensors
from ...bundle import SiteMap, sites_in
from ...errors import FormatError
from ...pack import Pack
from ...slots import Values, group_slots, pack_values, split_slot
from .slot_values import SlotValues

_NEAR = 5e-3
"""The largest accepted difference, relative to the largest value. Machines round products differently by less
than this; different adapters differ by more.
"""


def require_contents(expected: Values, found: Tensors, where: Path, name: str | None) -> None:
    """Checks that slots hold the values of an adapter; ``name`` is that adapter, or None for the base model.

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
    """Checks that slot 0 of an exported bank, the one for rows without an adapter, changes nothing.

    Raises:
        FormatError: slot 0 changes the base.
    """
    base = {name: array[0] for name, array in values.exported_bank().items()}
    require_contents(values.pad({}), base, values.folder, None)


def require_pack_slots(values: SlotValues, pack: Pack) -> None:
    """Checks that the slot of a pack in an exported bank holds the values of that pack.

    Raises:
        FormatError: the slot holds something else.
    """
    exported = values.exported_bank()
    slot = values.bundle.adapter(pack.name).slot or 0
    wide = values.pad(values.of(pack))
    require_contents(wide, {name: array[slot] for name, array in exported.items()}, values.folder, pack.name)


def require_file_contents(
    pack: Pack,
    sites: SiteMap,
    files: Mapping[str, Path],
    arrays: Mapping[str, Tensors],
) -> None:
    """Checks that the adapter files of a pack, one for each part of the bundle, hold its values. The values
    must not depend on the weights of the base model.

    Raises:
        FormatError: a file holds other values.
    """
    values = pack_values(pack, None, sites)
    for part, path in files.items():
        here = sites_in(part, sites)
        own = {name: array for name, array in values.items() if name.rpartition(".")[0] in here}
        # a graph may use other names than this package's for its slots
        found = {".".join(split_slot(name)): array for name, array in arrays[part].items()}
        require_contents(group_slots(own, here), found, path, pack.name)


def _near(one: np.ndarray, two: np.ndarray) -> bool:
    if np.array_equal(one, two):
        return True
    one, two = one.astype(np.float32), two.astype(np.float32)
    size = float(np.abs(two).max(initial=0.0))
    return bool(np.abs(one - two).max(initial=0.0) <= _NEAR * size)  # NaN is near nothing
