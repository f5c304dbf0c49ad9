"""The adapter bank of a running session: loads packs into the slots of its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ...errors import AdapterpackError, Unsupported
from ...pack.pack import Pack
from ...slots.values import padded
from ..ort_values import Memory, value_of
from .contents import require_base_slots, require_pack_slots
from .positions import require_positions
from .slot_values import SlotValues


class BankState(NamedTuple):
    """The bank at one moment: ``slots``, adapter -> number of its slot; ``arrays``, input of a graph ->
    contents of all slots; ``overrides``, the same on the device, by part. Without arrays the graph's own
    defaults are used. Never changed in place: a run keeps the state that it began with.
    """

    slots: Mapping[str, int]
    arrays: Mapping[str, np.ndarray]
    overrides: Mapping[str, Mapping[str, Any]]

    def without(self, name: str) -> BankState:
        """The state in which an adapter's slot is free; its contents stay until the slot is filled again."""
        return self._replace(slots={other: slot for other, slot in self.slots.items() if other != name})


class AdapterBank:
    """The slots of one bundle, and the ``values`` that packs have in them.

    Until a slot is filled the graph uses what it was exported with; from then on the whole bank is fed.
    """

    def __init__(self, values: SlotValues, memory: Memory) -> None:
        self.bundle, self.folder, self.values, self.memory = values.bundle, values.folder, values, memory

    def opened(self, packs: Mapping[str, Pack] | None) -> BankState:
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
        return BankState({adapter.name: int(adapter.slot or 0) for adapter in self.bundle.adapters}, {}, {})

    def load(self, state: BankState, pack: Pack) -> BankState:
        """The state with a pack of the bundle's base in a free slot. One without a head of its own has the
        base's.

        Raises:
            BaseMismatch: the pack was made for layers of other widths.
            Unsupported: no slot is free, or it does not fit.
        """
        require_positions(pack, self.bundle.sites)
        values, slots = self.values.of(pack), state.slots
        if pack.name in slots:
            raise AdapterpackError(
                "the session already has an adapter of that name",
                where=pack.name,
                remedy="choose another name",
            )
        free = min(set(range(1, self.bundle.slots)) - set(slots.values()), default=None)
        if free is None:
            raise Unsupported(
                "no slot is free",
                where=self.folder,
                expected=f"at most {self.bundle.slots - 1} adapters",
                found=len(slots) + 1,
                remedy="unload one, or export with more --slots",
            )
        arrays = state.arrays or self.values.exported()
        heads = {name: array[0] for name, array in arrays.items() if name.endswith((".head", ".head_bias"))}
        wide = padded(values, self.bundle.sites, self.bundle.max_rank, heads)
        filled = {
            name: np.concatenate([array[:free], wide[name][None], array[free + 1 :]])
            for name, array in arrays.items()
        }
        overrides: dict[str, dict[str, Any]] = {}
        for name, array in filled.items():
            part = self.bundle.sites[name.rpartition(".")[0]].part
            overrides.setdefault(part, {})[name] = value_of(array, self.memory)
        return BankState({**slots, pack.name: free}, filled, overrides)
