"""Runs a graph with adapters, in one class for each mode of a bundle.

``folded``: the adapters are merged into the weights. ``inputs``: each run feeds the values of one adapter.
``bank``: the graph stacks the values of several adapters along a first axis, one slot an adapter, and the
input ``adapter_ids`` selects the slot of each row. Slot 0 belongs to the base model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...bundle import ADAPTER_IDS, Bundle, adapter_files, graph_file
from ...errors import AdapterpackError, Unsupported
from ...pack import Pack
from ...slots import NoRoom, Values, fit, group_slots
from ...tasks import MAIN
from ..ort import HOST, Memory, OrtModel, array_of, value_of
from .contents import require_base_slots, require_file_contents, require_pack_slots
from .files import read_adapter_file
from .pinned import Adapters, RunRows, join_passes, owning
from .slot_values import SlotValues, reads_weights, require_positions


class OpenGraphs(Protocol):
    """The attributes of an open bundle that a mode uses."""

    folder: Path
    bundle: Bundle
    memory: Memory
    slot_values: SlotValues

    def graph(self, part: str) -> OrtModel:
        """Returns the graph of a part of the bundle."""
        ...


class AdapterMode:
    """How a session runs adapters.

    The state that a mode needs for that is an immutable value, :attr:`Adapters.attached`. Loading and
    unloading return a new value, so rows that are running keep the adapters with which they started.
    """

    def __init__(self, session: OpenGraphs) -> None:
        self.session = session

    def open(self, packs: Mapping[str, Pack] | None) -> Any:
        """Returns the state for the bundle's own adapters, after comparing them with these packs; with None
        it compares nothing.
        """

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> RunRows:
        """Returns a function that runs passes of rows with these adapters, one name a row."""
        raise NotImplementedError

    def load(self, attached: Any, pack: Pack) -> Any:
        """Returns the state with one more pack of the bundle's base."""
        raise Unsupported(
            "this bundle takes its adapters at export", found=pack.name, remedy="export with --mode bank"
        )

    def unload(self, attached: Any, name: str) -> Any:
        """Returns the state without an adapter."""
        raise NotImplementedError


class FoldedMode(AdapterMode):
    """The adapters are folded into the weights: every row runs with all of them."""

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> RunRows:
        """Runs the graph as it is, after refusing rows that ask for the base or for one adapter of
        several.
        """
        packs = adapters.packs
        if len(packs) == 1 and None in names:
            raise Unsupported(
                "a folded bundle has no base to run rows on",
                where=self.session.folder,
                remedy="export with --mode bank",
            )
        if len(packs) > 1 and any(names):
            raise Unsupported(
                "the adapters of this bundle are folded together, so rows cannot have one of them",
                found=", ".join(packs),
                where=self.session.folder,
                remedy="name none, or export with --mode bank",
            )
        return lambda feeds, part=MAIN, rows=None: self.session.graph(part).call(feeds)

    def unload(self, attached: None, name: str) -> None:
        """Refuses: the adapter cannot be taken out of the weights."""
        raise Unsupported(
            "the adapter is folded into the weights", found=name, remedy="export with --mode bank"
        )


def require_new(name: str, names: Collection[str]) -> None:
    """Checks that a session has no adapter of that name yet.

    Raises:
        AdapterpackError: it has.
    """
    if name in names:
        raise AdapterpackError(
            "the session already has an adapter of that name", where=name, remedy="choose another name"
        )


Slots = Mapping[str, Mapping[str, Any]]
"""Part of a bundle -> input of its graph -> the value to feed."""


class InputsMode(AdapterMode):
    """Each run feeds the slots of one adapter; a batch with several adapters runs once for each."""

    def open(self, packs: Mapping[str, Pack] | None) -> dict[str, Slots]:
        """Reads the adapter files of the bundle into memory, so that later changes of the files do not reach
        any answer.
        """
        bundle, memory = self.session.bundle, self.session.memory
        attached: dict[str, Slots] = {}
        for adapter in bundle.adapters:
            files = adapter_files(self.session.folder, bundle, adapter)
            arrays = {part: read_adapter_file(path) for part, path in files.items()}
            pack = None if packs is None else packs[adapter.name]
            if pack is not None and not reads_weights(pack):
                require_file_contents(pack, bundle.sites, files, arrays)
            attached[adapter.name] = {
                part: {slot: owning(array, memory) for slot, array in one.items()}
                for part, one in arrays.items()
            }
        return attached

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> RunRows:
        """Returns a function that splits a batch by adapter, runs each share with its slot values, and joins
        the results.
        """
        attached: Mapping[str, Slots] = adapters.attached

        def slots(name: str | None, part: str) -> Mapping[str, Any]:
            return {} if name is None else attached[name].get(part, {})

        def run(
            feeds: Mapping[str, Any], part: str = MAIN, rows: Sequence[int] | None = None
        ) -> dict[str, Any]:
            chosen = names if rows is None else [names[row] for row in rows]
            graph = self.session.graph(part)
            if len(set(chosen)) <= 1:
                return graph.call({**feeds, **slots(next(iter(chosen), None), part)})

            def share(name: str | None) -> tuple[np.ndarray, dict[str, Any]]:
                mine = np.flatnonzero([other == name for other in chosen])
                some = {key: value_of(array_of(value)[mine]) for key, value in feeds.items()}
                return mine, graph.call({**some, **slots(name, part)})

            return join_passes(map(share, dict.fromkeys(chosen)))

        return run

    def load(self, attached: Mapping[str, Slots], pack: Pack) -> dict[str, Slots]:
        """Returns the files and the values of a pack, fitted to the inputs of the graph.

        Raises:
            Unsupported: the graph has no input for a part of it, or one of a smaller rank.
        """
        require_new(pack.name, attached)
        session = self.session
        sites = self.session.bundle.sites
        require_positions(pack, sites)
        values = group_slots(session.slot_values.of(pack), sites)
        fitted, _ = fit(values, session.folder / graph_file(MAIN))
        own = {name: owning(array, session.memory) for name, array in fitted.items()}
        return {**attached, pack.name: {MAIN: own}}

    def unload(self, attached: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Returns the files without those of one adapter."""
        return {other: files for other, files in attached.items() if other != name}


class BankState(NamedTuple):
    """A snapshot of the bank, which a run keeps while others load and unload adapters.

    ``slots`` maps an adapter to its slot. ``arrays`` maps an input of a graph to the contents of all slots,
    and ``overrides`` holds the same arrays on the device, by part of the bundle. While both are empty, the
    graph uses the initializers with which it was exported. ``used`` are the slots that hold or once held an
    adapter: a run that started earlier may still read them. ``engine_only`` says why adapters have no slot:
    the engine answers for them.
    """

    slots: Mapping[str, int]
    arrays: Mapping[str, np.ndarray] = {}
    overrides: Mapping[str, Mapping[str, Any]] = {}
    used: frozenset[int] = frozenset()
    engine_only: Mapping[str, NoRoom] = {}


class BankMode(AdapterMode):
    """The graph holds a bank of slots, and ``adapter_ids`` selects a slot for each row, so mixed batches take
    one pass.

    Until the first pack is loaded the graphs use their exported initializers; after that every run feeds the
    whole bank.
    """

    def __init__(self, session: OpenGraphs) -> None:
        super().__init__(session)
        self.values, self.bundle = session.slot_values, session.bundle

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

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> RunRows:
        """Returns a function that runs the graph with the slot number of each row."""
        slots, overrides = adapters.attached.slots, adapters.attached.overrides
        for name in names:
            if name in adapters.attached.engine_only:
                raise adapters.attached.engine_only[name]
        ids = np.array([0 if name is None else slots[name] for name in names], np.int64)

        def run(
            feeds: Mapping[str, Any], part: str = MAIN, rows: Sequence[int] | None = None
        ) -> dict[str, Any]:
            graph = self.session.graph(part)
            if ADAPTER_IDS not in graph.inputs:  # no adapter reaches this graph
                return graph.call(feeds)
            batch_ids = value_of(ids if rows is None else ids[list(rows)], graph.memory)
            return graph.call({**feeds, ADAPTER_IDS: batch_ids, **overrides.get(part, {})})

        return run

    def load(self, attached: BankState, pack: Pack) -> BankState:
        """Returns the state with a pack in a free slot. A pack without a head of its own uses the base
        model's head. Where its rank is larger than the slots', but the bundle has the engine's graph, the
        pack has no slot: it answers, as in a server, and does not run in the bank.

        Raises:
            BaseMismatch: the pack was made for layers of other widths.
            Unsupported: no slot is free, or it does not fit.
        """
        try:
            return self._into_slot(attached, pack)
        except NoRoom as error:
            if not self.bundle.decoder:
                raise
            return attached._replace(engine_only={**attached.engine_only, pack.name: error})

    def _into_slot(self, attached: BankState, pack: Pack) -> BankState:
        slots = attached.slots
        require_new(pack.name, {*slots, *attached.engine_only})
        values = self.values.in_bank(pack)
        free = set(range(1, self.bundle.slots)) - set(slots.values())
        if not free:
            raise Unsupported(
                "no slot is free",
                where=self.session.folder,
                expected=f"at most {self.bundle.slots - 1} adapters",
                found=len(slots) + 1,
                remedy="unload one, or export with more --slots",
            )
        # Prefers a slot that was never used: it can be written in place, without a copy of the bank.
        slot = min(free, key=lambda slot: (slot in attached.used, slot))
        changed = self.write(attached, {slot: values}, in_place=slot not in attached.used)
        return changed._replace(slots={**slots, pack.name: slot}, used=attached.used | {slot})

    def unload(self, attached: BankState, name: str) -> BankState:
        """Returns the state with the slot of an adapter free. Its contents stay until another adapter takes
        the slot.
        """
        slots = {other: slot for other, slot in attached.slots.items() if other != name}
        engine_only = {other: error for other, error in attached.engine_only.items() if other != name}
        return attached._replace(slots=slots, engine_only=engine_only)

    def write(self, state: BankState, values: Mapping[int, Values], *, in_place: bool) -> BankState:
        """Returns the state with these values in these slots. ``in_place`` promises that no run reads the
        slots, so the arrays of the others need not be copied.
        """
        arrays = state.arrays
        known = in_place and bool(state.arrays)
        if not known:
            arrays = {
                name: np.array(array) for name, array in (arrays or self.values.exported_bank()).items()
            }
        for slot, written in values.items():
            for name, array in written.items():
                arrays[name][slot] = array
        if known and self.session.memory == HOST:  # on the CPU the OrtValues share the memory of the arrays
            return state
        overrides: dict[str, dict[str, Any]] = {}
        for name, array in arrays.items():
            part = self.bundle.sites[name.rpartition(".")[0]].part
            overrides.setdefault(part, {})[name] = value_of(array, self.session.memory)
        return state._replace(arrays=arrays, overrides=overrides)


ADAPTER_MODES: dict[str, type[AdapterMode]] = {
    "folded": FoldedMode,
    "inputs": InputsMode,
    "bank": BankMode,
}
"""Mode of a bundle -> the class that runs its adapters."""
