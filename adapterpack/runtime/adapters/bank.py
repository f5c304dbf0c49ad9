"""The adapter bank of a running session: writes packs into the slots of its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ...errors import AdapterpackError, Unsupported
from ...pack.pack import Pack
from ...slots.values import Values
from ..ort.values import HOST, Memory, value_of
from .contents import require_base_slots, require_pack_slots
from .slot_values import SlotValues


class BankState(NamedTuple):
    """The bank at one moment: ``slots``, adapter -> number of its slot; ``arrays``, input of a graph ->
    contents of all slots; ``overrides``, the same on the device, by part. Without arrays the graph's own
    defaults are used. ``used`` are the slots that hold or held an adapter, which a run may still read: a run
    keeps the state that it began with.
    """

    slots: Mapping[str, int]
    arrays: Mapping[str, np.ndarray] = {}
    overrides: Mapping[str, Mapping[str, Any]] = {}
    used: frozenset[int] = frozenset()

    def without(self, name: str) -> BankState:
        """The state in which an adapter's slot is free; its contents stay until the slot is filled again."""
        return self._replace(slots={other: slot for other, slot in self.slots.items() if other != name})


class AdapterBank:
    """The slots of one bundle, and the ``values`` that packs have in them.

    Until a slot is filled the graph uses what it was exported with; from then on the whole bank is fed.
    """

    def __init__(self, values: SlotValues, memory: Memory) -> None:
        self.bundle, self.folder, self.values, self.memory = values.bundle, values.folder, values, memory

    def open(self, packs: Mapping[str, Pack] | None) -> BankState:
        """The bank as it was exported, whose slots are compared with these packs, and the base's with none;
        with None nothing is compared.

        Raises:
            FormatError: a slot holds another adapter, or that of the base changes it.
        """
        if packs is not None:
            require_base_slots(self.values)
        for pack in (packs or {}).values():
            if not self.values.reads_lost_weights(pack):
                require_pack_slots(self.values, pack)
        slots = {adapter.name: int(adapter.slot or 0) for adapter in self.bundle.adapters}
        return BankState(slots, used=frozenset(slots.values()))

    def load(self, state: BankState, pack: Pack) -> BankState:
        """The state with a pack of the bundle's base in a free slot. One without a head of its own has the
        base's.

        Raises:
            BaseMismatch: the pack was made for layers of other widths.
            Unsupported: no slot is free, or it does not fit.
        """
        values, slots = self.values.in_bank(pack), state.slots
        if pack.name in slots:
            raise AdapterpackError(
                "the session already has an adapter of that name",
                where=pack.name,
                remedy="choose another name",
            )
        free = set(range(1, self.bundle.slots)) - set(slots.values())
        if not free:
            raise Unsupported(
                "no slot is free",
                where=self.folder,
                expected=f"at most {self.bundle.slots - 1} adapters",
                found=len(slots) + 1,
                remedy="unload one, or export with more --slots",
            )
        slot = min(free, key=lambda slot: (slot in state.used, slot))
        changed = self.write(state, {slot: values}, in_place=slot not in state.used)
        return changed._replace(slots={**slots, pack.name: slot}, used=state.used | {slot})

    def write(self, state: BankState, values: Mapping[int, Values], *, in_place: bool) -> BankState:
        """The state with these values in these slots. ``in_place``: no run reads the slots, so that the
        others' arrays need not be copied.
        """
        arrays, known = state.arrays, in_place and bool(state.arrays)
        if not known:
            arrays = {
                name: np.array(array) for name, array in (arrays or self.values.exported_bank()).items()
            }
        for slot, written in values.items():
            for name, array in written.items():
                arrays[name][slot] = array
        if known and self.memory == HOST:  # where a value has the array's own memory
            return state
        overrides: dict[str, dict[str, Any]] = {}
        for name, array in arrays.items():
            part = self.bundle.sites[name.rpartition(".")[0]].part
            overrides.setdefault(part, {})[name] = value_of(array, self.memory)
        return state._replace(arrays=arrays, overrides=overrides)
