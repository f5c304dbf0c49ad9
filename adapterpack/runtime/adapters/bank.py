"""The adapter bank of a running session: writes packs into the slots of its graphs.

A bank stacks the values of several adapters along a first axis, one slot an adapter; the input
``adapter_ids`` selects the slot of each row. Slot 0 belongs to the base model.
"""

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
    """A snapshot of the bank, which a run keeps while others load and unload adapters.

    ``slots`` maps an adapter to its slot. ``arrays`` maps an input of a graph to the contents of all slots,
    and ``overrides`` holds the same arrays on the device, by part of the bundle. While both are empty, the
    graph uses the initializers with which it was exported. ``used`` are the slots that hold or once held an
    adapter: a run that started earlier may still read them.
    """

    slots: Mapping[str, int]
    arrays: Mapping[str, np.ndarray] = {}
    overrides: Mapping[str, Mapping[str, Any]] = {}
    used: frozenset[int] = frozenset()

    def without(self, name: str) -> BankState:
        """Returns the state in which the slot of an adapter is free. Its contents stay until another adapter
        takes the slot.
        """
        return self._replace(slots={other: slot for other, slot in self.slots.items() if other != name})


class AdapterBank:
    """Loads packs into the slots of one bundle; ``values`` computes what each pack writes there.

    Until the first pack is loaded the graphs use their exported initializers; after that every run feeds the
    whole bank.
    """

    def __init__(self, values: SlotValues, memory: Memory) -> None:
        self.bundle, self.folder, self.values, self.memory = values.bundle, values.folder, values, memory

    def open(self, packs: Mapping[str, Pack] | None) -> BankState:
        """Returns the exported bank, after it has checked that each slot holds the pack of its name and that
        slot 0 changes nothing. With None it checks nothing.

        Raises:
            FormatError: a slot holds another adapter, or slot 0 changes the base.
        """
        if packs is not None:
            require_base_slots(self.values)
        for pack in (packs or {}).values():
            if not self.values.reads_lost_weights(pack):
                require_pack_slots(self.values, pack)
        slots = {adapter.name: int(adapter.slot or 0) for adapter in self.bundle.adapters}
        return BankState(slots, used=frozenset(slots.values()))

    def load(self, state: BankState, pack: Pack) -> BankState:
        """Returns the state with a pack of the bundle's base in a free slot. A pack without a head of its own
        uses the base model's head.

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
        # Prefers a slot that was never used: it can be written in place, without a copy of the bank.
        slot = min(free, key=lambda slot: (slot in state.used, slot))
        changed = self.write(state, {slot: values}, in_place=slot not in state.used)
        return changed._replace(slots={**slots, pack.name: slot}, used=state.used | {slot})

    def write(self, state: BankState, values: Mapping[int, Values], *, in_place: bool) -> BankState:
        """Returns the state with these values in these slots. ``in_place`` promises that no run reads the
        slots, so the arrays of the others need not be copied.
        """
        arrays, known = state.arrays, in_place and bool(state.arrays)
        if not known:
            arrays = {
                name: np.array(array) for name, array in (arrays or self.values.exported_bank()).items()
            }
        for slot, written in values.items():
            for name, array in written.items():
                arrays[name][slot] = array
        if known and self.memory == HOST:  # on the CPU the OrtValues share the memory of the arrays
            return state
        overrides: dict[str, dict[str, Any]] = {}
        for name, array in arrays.items():
            part = self.bundle.sites[name.rpartition(".")[0]].part
            overrides.setdefault(part, {})[name] = value_of(array, self.memory)
        return state._replace(arrays=arrays, overrides=overrides)
