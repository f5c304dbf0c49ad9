"""Runs batches of encoder requests with the adapters of their rows, in one class for each mode of a
bundle.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...adapter_methods import Tensors
from ...errors import Unsupported
from ...pack import Pack, canary
from ...slots import Values
from ...tasks import Arrays
from ..adapters import Adapters, BankMode, BankState, Mix, PinnedRows, parts_of
from ..canary import Replay, replay_one, trained_modules
from ..open_bundle import OpenBundle
from ..pipeline import run_parts
from .adapter_feeds import ResidentAdapter, array_of


class BankedAdapters:
    """Runs batches with any number of adapters on a bank with a few slots, as an LRU cache.

    A batch can use as many adapters as the bank has slots. Adapters without a slot take those that rows have
    not used for the longest time, and only their own arrays are written. Mixes give up their slots first and
    may fill at most half of the slots of a batch, because any request can make up a new mix and would
    otherwise displace the named packs.
    """

    def __init__(self, bundle: OpenBundle) -> None:
        self._bundle, self._mode = bundle, BankMode(bundle)
        self._slots = {adapter.pack: int(adapter.slot or 0) for adapter in bundle.bundle.adapters}
        """Digest -> slot, the least recently used first."""
        self._mixes = set[str]()
        """The digests of the mixes that have a slot."""
        self._state = BankState(self._slots)
        self._running = threading.Lock()
        """Held during every pass, because slots are written in place between passes."""

    def read(self, pack: Pack | Mix) -> ResidentAdapter:
        """Reads a pack into memory and returns it as rows hold it: its values, padded to the widths of the
        bank's slots.

        Raises:
            Unsupported: the bundle cannot run rows with it.
            BaseMismatch: the adapter was made for layers of other widths.
        """
        if self._bundle.bundle.slots < 2:
            raise Unsupported(
                "the bundle's bank has room for the base alone",
                where=self._bundle.folder,
                found=pack.name,
                remedy="export with more --slots",
            )
        with self._bundle.compare_files():
            values = self._mode.values.in_bank(pack)
        packs = frozenset(one.id for one, _ in parts_of(pack))
        return ResidentAdapter(pack.name, pack.id, values, {}, pack.acts, packs=packs)

    def fit(self, adapters: Collection[ResidentAdapter | None]) -> bool:
        """Returns whether the bank has a slot for each adapter, and mixes stay within half of the slots. The
        base has slot 0.
        """
        distinct = {adapter for adapter in adapters if adapter is not None}
        slots = self._bundle.bundle.slots - 1
        return len(distinct) <= slots and sum(adapter.mixed for adapter in distinct) <= max(1, slots // 2)

    def run(self, inputs: Tensors, adapters: Sequence[ResidentAdapter | None]) -> Arrays:
        """Puts adapters that :meth:`fit` into slots and runs one pass; each row has an adapter, or None for
        the base.
        """
        digests = [None if adapter is None else adapter.digest for adapter in adapters]
        # A pass on a bank only asks its packs where they act, which these adapters say as well.
        named: dict[str, Any] = {adapter.digest: adapter for adapter in adapters if adapter is not None}
        with self._running:
            self._place(named)
            attached = Adapters(named, {}, self._state)
            pinned = PinnedRows(digests, attached, self._mode.run(attached, digests))
            return run_parts(self._bundle, inputs, pinned=pinned)

    def _place(self, wanted: Mapping[str, ResidentAdapter]) -> None:
        """Puts each of these adapters into a slot and marks it as recently used."""
        missing = [adapter for digest, adapter in wanted.items() if digest not in self._slots]
        for digest in wanted.keys() & self._slots.keys():
            self._slots[digest] = self._slots.pop(digest)
        if not missing:
            return
        written: dict[int, Values] = {}
        for adapter in missing:
            slot = self._slots[adapter.digest] = self._free(wanted)
            written[slot] = {name: array_of(value) for name, value in adapter.values.items()}
            if adapter.mixed:
                self._mixes.add(adapter.digest)
        self._state = self._mode.write(self._state, written, in_place=True)

    def _free(self, wanted: Mapping[str, ResidentAdapter]) -> int:
        """Returns a slot that no row of the batch needs: an empty one, else the least recently used one,
        mixes first.
        """
        empty = min(set(range(1, self._bundle.bundle.slots)) - set(self._slots.values()), default=None)
        if empty is not None:
            return empty
        digest = min(
            (digest for digest in self._slots if digest not in wanted),
            key=lambda digest: digest not in self._mixes,
        )
        self._mixes.discard(digest)
        return self._slots.pop(digest)

    def replay(self, pack: Pack, adapter: ResidentAdapter) -> Replay:
        """Runs the canary of a pack that was read as this adapter, and as its base with a temporary adapter
        of the trained modules alone.
        """
        recorded = pack.manifest.canary
        assert recorded is not None
        values = self._mode.values.pad(trained_modules(self._bundle.bundle, pack))
        digest = f"{pack.id}, its trained modules alone"
        bare = ResidentAdapter(pack.name, digest, values, {}, pack.acts)
        base, adapted = (
            [
                canary.row_of(self.run(inputs, [one]))
                for inputs in canary.feeds(recorded, sound=self._bundle.sound_input)
            ]
            for one in (bare, adapter)
        )
        return Replay(recorded, base, adapted)


class ExportedAdapters:
    """Runs the adapters with which the bundle was exported, and no others. Their canaries were replayed at
    export.
    """

    def __init__(self, bundle: OpenBundle) -> None:
        self._bundle = bundle.freeze()
        self._names = {pack.id: name for name, pack in bundle.packs.items()}

    def read(self, pack: Pack | Mix) -> ResidentAdapter:
        """Checks that the bundle was exported with the pack; its values are in the bundle already."""
        name = self._names.get(pack.id)
        if name is None:
            raise Unsupported(
                "this bundle takes its adapters at export", found=pack.name, remedy="export with --mode bank"
            )
        self._bundle.pin([name])
        return ResidentAdapter(name, pack.id, {}, {})

    def fit(self, adapters: Collection[ResidentAdapter | None]) -> bool:
        """Returns whether the rows share one adapter: these graphs run with one at a time."""
        return len({*adapters}) == 1

    def run(self, inputs: Tensors, adapters: Sequence[ResidentAdapter | None]) -> Arrays:
        """Runs one pass with the adapter of the batch."""
        names = [None if adapter is None else adapter.name for adapter in adapters]
        return run_parts(self._bundle, inputs, names)

    def replay(self, pack: Pack, adapter: ResidentAdapter) -> Replay:
        """Runs the canary of a pack that the bundle was exported with."""
        return replay_one(self._bundle, pack, adapter.name)


BATCH_ADAPTERS: dict[str, type[BankedAdapters | ExportedAdapters]] = {
    "bank": BankedAdapters,
    "inputs": ExportedAdapters,
    "folded": ExportedAdapters,
}
"""Mode of a bundle -> the class that runs its batches."""
