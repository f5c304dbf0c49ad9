"""The adapter bank of a running session: loads packs into the slots of its graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...base import compatibility
from ...bundle.manifest import Bundle
from ...errors import AdapterpackError, Unsupported
from ...manifest.manifest import Base
from ...onnx_graph.graph_file import Stored
from ...pack.pack import Pack
from ...slots.values import padded
from ..ort_values import Memory, value_of
from .contents import require_contents
from .positions import require_positions
from .slot_values import SlotValues


class BankState(NamedTuple):
    """The bank at one moment: ``slots``, adapter -> number of its slot; ``arrays``, input of a graph -> contents of all slots;
    ``overrides``, the same on the device, by part. Without arrays the graph's own defaults are used. Never changed in place: a run keeps
    the state that it began with.
    """

    slots: Mapping[str, int]
    arrays: Mapping[str, np.ndarray]
    overrides: Mapping[str, Mapping[str, Any]]

    def without(self, name: str) -> BankState:
        """The state in which an adapter's slot is free; its contents stay until the slot is filled again."""
        return self._replace(slots={other: slot for other, slot in self.slots.items() if other != name})


class AdapterBank:
    """The slots of one bundle; ``stored`` says where a part's graph stores its initializers.

    Until a slot is filled the graph uses what it was exported with; from then on the whole bank is fed.
    """

    def __init__(self, bundle: Bundle, folder: Path, memory: Memory, stored: Callable[[str], Mapping[str, Stored]]) -> None:
        self.bundle, self.folder, self.memory = bundle, folder, memory
        self.values = SlotValues(bundle, folder, stored)

    def opened(self, packs: Mapping[str, Pack]) -> BankState:
        """The bank as it was exported, whose slots hold these of its packs.

        Raises:
            FormatError: a slot holds another adapter, or that of the base changes it.
        """
        slots = {adapter.name: int(adapter.slot or 0) for adapter in self.bundle.adapters}
        if packs and not any(map(self.values.reads_lost_weights, packs.values())):
            exported = self.values.exported()
            base = {name: array[0] for name, array in exported.items()}
            heads = {name: array for name, array in base.items() if _is_head(name)}
            require_contents(padded({}, self.bundle.sites, self.bundle.max_rank, heads), base, self.folder, None)
            for name, pack in packs.items():
                wide = padded(self.values.of(pack), self.bundle.sites, self.bundle.max_rank, heads)
                require_contents(wide, {slot: array[slots[name]] for slot, array in exported.items()}, self.folder, name)
        return BankState(slots, {}, {})

    def load(self, state: BankState, pack: Pack, base: Base, allow_structural: bool = False) -> BankState:
        """The state with a pack in a free slot. A pack without a head of its own has the base's.

        Raises:
            BaseMismatch: the pack belongs to another base.
            Unsupported: no slot is free, or it does not fit.
        """
        pack.require_levels(compatibility.recorded_fingerprint(base), name=base.name, where=self.folder,
                            model_type=base.model_type, allow_structural=allow_structural)
        require_positions(pack, self.bundle.sites)
        values, slots = self.values.of(pack), state.slots
        if pack.name in slots:
            raise AdapterpackError("the session already has an adapter of that name", where=pack.name, remedy="choose another name")
        free = min(set(range(1, self.bundle.slots)) - set(slots.values()), default=None)
        if free is None:
            raise Unsupported("no slot is free", where=self.folder, expected=f"at most {self.bundle.slots - 1} adapters",
                              found=len(slots) + 1, remedy="unload one, or export with more --slots")
        arrays = state.arrays or self.values.exported()
        heads = {name: array[0] for name, array in arrays.items() if _is_head(name)}
        wide = padded(values, self.bundle.sites, self.bundle.max_rank, heads)
        filled = {name: np.concatenate([array[:free], wide[name][None], array[free + 1 :]]) for name, array in arrays.items()}
        overrides: dict[str, dict[str, Any]] = {}
        for name, array in filled.items():
            part = self.bundle.sites[name.rpartition(".")[0]].part
            overrides.setdefault(part, {})[name] = value_of(array, self.memory)
        return BankState({**slots, pack.name: free}, filled, overrides)


def _is_head(slot: str) -> bool:
    return slot.endswith((".head", ".head_bias"))
