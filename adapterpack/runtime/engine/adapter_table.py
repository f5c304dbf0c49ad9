"""The adapters whose values are in memory, by digest: read when a row first needs them, given up again when memory is short."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from ...pack.pack import Pack
from .adapter_feeds import ResidentAdapter


class AdapterTable:
    """Up to ``budget`` bytes of adapters that no row runs with, the least recently used given up first; those of running rows, and pinned
    ones, always stay. ``read`` makes a pack resident; it may be called by any thread.
    """

    def __init__(self, read: Callable[[Pack], ResidentAdapter], budget: int) -> None:
        self._read, self.budget = read, budget
        self._lock = threading.Lock()
        self._resident: OrderedDict[str, ResidentAdapter] = OrderedDict()
        self._reading: dict[str, threading.Lock] = {}
        self._pinned: set[str] = set()

    def taken(self, pack: Pack) -> ResidentAdapter:
        """The adapter for one more row; it is in memory until :meth:`released`."""
        with self._lock:
            mine = self._reading.setdefault(pack.id, threading.Lock())
        with mine:  # a pack is read once, however many rows ask for it meanwhile
            with self._lock:
                adapter = self._resident.get(pack.id)
                if adapter is not None:
                    adapter.users += 1
                    self._resident.move_to_end(pack.id)
                    return adapter
            adapter = self._read(pack)
            with self._lock:
                adapter.users += 1
                self._resident[pack.id] = adapter
                self._reading.pop(pack.id, None)
                self._evict()
                return adapter

    def released(self, adapter: ResidentAdapter) -> None:
        """A row has ended."""
        with self._lock:
            adapter.users -= 1
            self._evict()

    def pin(self, pack: Pack) -> None:
        """Reads a pack, if it is not in memory, and keeps it there."""
        adapter = self.taken(pack)
        with self._lock:
            self._pinned.add(pack.id)
        self.released(adapter)

    def unpin(self, digest: str) -> None:
        """Lets an adapter be given up again."""
        with self._lock:
            self._pinned.discard(digest)
            self._evict()

    def drop(self, digest: str) -> None:
        """Gives an adapter up, as soon as no row runs with it."""
        with self._lock:
            self._pinned.discard(digest)
            adapter = self._resident.get(digest)
            if adapter is not None and not adapter.users:
                del self._resident[digest]

    @property
    def nbytes(self) -> int:
        """The size of all adapters in memory."""
        with self._lock:
            return sum(adapter.nbytes for adapter in self._resident.values())

    @property
    def digests(self) -> list[str]:
        """The adapters in memory, the least recently used first."""
        with self._lock:
            return list(self._resident)

    def _evict(self) -> None:
        total = sum(adapter.nbytes for adapter in self._resident.values())
        for digest, adapter in list(self._resident.items()):
            if total <= self.budget:
                return
            if not adapter.users and digest not in self._pinned:
                del self._resident[digest]
                total -= adapter.nbytes
