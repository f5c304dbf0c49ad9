"""Runs a graph with adapters, one class a mode: in the weights, in slots that are fed, or from a bank."""

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
    """What a mode needs of an open bundle."""

    folder: Path
    bundle: Bundle
    memory: Memory
    slot_values: SlotValues

    def graph(self, part: str) -> OrtModel:
        """The graph of that part."""
        ...


class AdapterMode(Protocol):
    """How a session runs adapters. What the mode needs to run them is a value, :attr:`Adapters.attached`:
    loading and unloading make another one and leave the old one to the rows that have begun with it.
    """

    def open(self, packs: Mapping[str, Pack] | None) -> Any:
        """The value of the bundle's own adapters, which are compared with these packs, or with nothing."""
        ...

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> RunRows:
        """One run after another with these of the adapters, one a row."""
        ...

    def load(self, attached: Any, pack: Pack) -> Any:
        """The value with another pack of the bundle's base."""
        ...

    def unload(self, attached: Any, name: str) -> Any:
        """The value without one."""
        ...


class FoldedMode:
    """The adapters are folded into the weights: every row has them, and none can choose."""

    def __init__(self, session: OpenGraphs) -> None:
        self.session = session

    def open(self, packs: Mapping[str, Pack] | None) -> None:
        """See :class:`AdapterMode`."""

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> RunRows:
        """See :class:`AdapterMode`."""
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
        """See :class:`AdapterMode`."""
        raise Unsupported(
            "a folded bundle takes no further adapters", found=pack.name, remedy="export with --mode bank"
        )

    def unload(self, attached: None, name: str) -> None:
        """See :class:`AdapterMode`."""
        raise Unsupported(
            "the adapter is folded into the weights", found=name, remedy="export with --mode bank"
        )


Slots = Mapping[str, Mapping[str, Any]]
"""Part of a bundle -> input of its graph -> its value."""


class InputsMode:
    """The slots of one adapter are fed in each run: a mixed batch runs once for each adapter in it."""

    def __init__(self, session: OpenGraphs) -> None:
        self.session = session

    def open(self, packs: Mapping[str, Pack] | None) -> dict[str, Slots]:
        """See :class:`AdapterMode`. What the files hold is copied: nothing that is written into them later is
        in an answer.
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
        """See :class:`AdapterMode`."""
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
        """See :class:`AdapterMode`."""
        raise Unsupported(
            "this bundle takes its adapters at export", found=pack.name, remedy="export with --mode bank"
        )

    def unload(self, attached: Mapping[str, Any], name: str) -> dict[str, Any]:
        """See :class:`AdapterMode`."""
        return {other: files for other, files in attached.items() if other != name}


class BankMode:
    """Stacked slots on the device; ``adapter_ids`` chooses one for each row."""

    def __init__(self, session: OpenGraphs) -> None:
        self.session = session
        self.bank = AdapterBank(session.slot_values, session.memory)

    def open(self, packs: Mapping[str, Pack] | None) -> BankState:
        """See :class:`AdapterMode`."""
        return self.bank.open(packs)

    def run(self, adapters: Adapters, names: Sequence[str | None]) -> RunRows:
        """See :class:`AdapterMode`."""
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
        """See :class:`AdapterMode`."""
        return self.bank.load(attached, pack)

    def unload(self, attached: BankState, name: str) -> BankState:
        """See :class:`AdapterMode`."""
        return attached.without(name)


ADAPTER_MODES: dict[str, Callable[[Any], AdapterMode]] = {
    "folded": FoldedMode,
    "inputs": InputsMode,
    "bank": BankMode,
}
"""Mode -> how a session runs adapters."""
