"""Runs a graph with adapters, in one class for each mode of a bundle.

``folded``: the adapters are merged into the weights. ``inputs``: each run feeds the values of one adapter.
``bank``: the graph holds several adapters, and each row selects its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...bundle.files import adapter_files
from ...bundle.manifest import ADAPTER_IDS, Bundle
from ...errors import Unsupported
from ...pack.pack import Pack
from ...tasks.task import MAIN
from ..ort.model import OrtModel
from ..ort.values import Memory, array_of, value_of
from .bank import AdapterBank, BankState
from .contents import require_file_contents
from .files import read_adapter_file
from .pinned import Adapters, RunRows
from .rows_apart import join_rows, owning
from .slot_values import SlotValues, reads_weights


class OpenGraphs(Protocol):
    """The attributes of an open bundle that a mode uses."""

    folder: Path
    bundle: Bundle
    memory: Memory
    slot_values: SlotValues

    def graph(self, part: str) -> OrtModel:
        """Returns the graph of a part of the bundle."""
        ...


class AdapterMode(Protocol):
    """How a session runs adapters.

    The state that a mode needs for that is an immutable value, :attr:`Adapters.attached`. Loading and
    unloading return a new value, so rows that are running keep the adapters with which they started.
    """

    def open(self, packs: Mapping[str, Pack] | None) -> Any:
        """Returns the state for the bundle's own adapters, after comparing them with these packs; with None
        it compares nothing.
        """
        ...

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> RunRows:
        """Returns a function that runs passes of rows with these adapters, one name a row."""
        ...

    def load(self, attached: Any, pack: Pack) -> Any:
        """Returns the state with one more pack of the bundle's base."""
        ...

    def unload(self, attached: Any, name: str) -> Any:
        """Returns the state without an adapter."""
        ...


class FoldedMode:
    """The adapters are folded into the weights: every row runs with all of them."""

    def __init__(self, session: OpenGraphs) -> None:
        self.session = session

    def open(self, packs: Mapping[str, Pack] | None) -> None:
        """Returns None: the weights hold the adapters, so there is no state."""

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

    def load(self, attached: None, pack: Pack) -> None:
        """Refuses the pack: a folded graph has no slots."""
        raise Unsupported(
            "a folded bundle takes no further adapters", found=pack.name, remedy="export with --mode bank"
        )

    def unload(self, attached: None, name: str) -> None:
        """Refuses: the adapter cannot be taken out of the weights."""
        raise Unsupported(
            "the adapter is folded into the weights", found=name, remedy="export with --mode bank"
        )


Slots = Mapping[str, Mapping[str, Any]]
"""Part of a bundle -> input of its graph -> the value to feed."""


class InputsMode:
    """Each run feeds the slots of one adapter; a batch with several adapters runs once for each."""

    def __init__(self, session: OpenGraphs) -> None:
        self.session = session

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
            parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
            for name in dict.fromkeys(chosen):
                mine = np.array([row for row, other in enumerate(chosen) if other == name])
                some = {key: value_of(array_of(value)[mine]) for key, value in feeds.items()}
                for key, value in graph.call({**some, **slots(name, part)}).items():
                    parts.setdefault(key, []).append((mine, array_of(value)))
            return {key: owning(join_rows(pieces)) for key, pieces in parts.items()}

        return run

    def load(self, attached: Any, pack: Pack) -> Any:
        """Refuses the pack: the adapter files are written at export."""
        raise Unsupported(
            "this bundle takes its adapters at export", found=pack.name, remedy="export with --mode bank"
        )

    def unload(self, attached: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Returns the files without those of one adapter."""
        return {other: files for other, files in attached.items() if other != name}


class BankMode:
    """The graph holds a bank of slots, and ``adapter_ids`` selects a slot for each row, so mixed batches take
    one pass.
    """

    def __init__(self, session: OpenGraphs) -> None:
        self.session = session
        self.bank = AdapterBank(session.slot_values, session.memory)

    def open(self, packs: Mapping[str, Pack] | None) -> BankState:
        """Returns the state of the bank as it was exported."""
        return self.bank.open(packs)

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> RunRows:
        """Returns a function that runs the graph with the slot number of each row."""
        slots, overrides = adapters.attached.slots, adapters.attached.overrides
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
        """Returns the state with a pack in a free slot."""
        return self.bank.load(attached, pack)

    def unload(self, attached: BankState, name: str) -> BankState:
        """Returns the state with the slot of an adapter free."""
        return attached.without(name)


ADAPTER_MODES: dict[str, Callable[[Any], AdapterMode]] = {
    "folded": FoldedMode,
    "inputs": InputsMode,
    "bank": BankMode,
}
"""Mode of a bundle -> the class that runs its adapters."""
