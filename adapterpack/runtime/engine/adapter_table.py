"""The adapters of an engine: packs by name, and resident adapters by digest.

The engine reads a pack when a row first needs it, and evicts it when memory is short. Rows hold a reference
to the adapter with which they run, so a name can be unloaded or reassigned at any time: running rows finish
with the old pack, and new rows get the new one.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from ...errors import AdapterpackError, StorageError, UnknownAdapter, nearest
from ...pack import Pack
from ...pack.trust.sign import Signers
from ...pack.validate import ListedPack, as_pack
from ...paths import StrPath
from ..adapters import Mix, combine, parts_of
from ..admission import require_canary, require_outline, require_runnable, why_not_replayed
from ..canary import Replay
from ..open_bundle import OpenBundle
from .adapter_feeds import ResidentAdapter

Named = str | Pack | Mix | Mapping[str, float] | None
"""How a caller names the adapter of a row; :meth:`AdapterTable.of_row` resolves it."""


class AdapterTable:
    """Keeps up to ``budget`` bytes of adapters that no row uses, and evicts the least recently used first.
    Adapters of running rows and pinned ones always stay. Mixes never displace packs, since any request can
    make up a new mix.

    All methods are thread-safe. ``read`` makes a pack resident, and ``replay`` runs the canary of a pack.
    """

    def __init__(
        self,
        bundle: OpenBundle,
        read: Callable[[Pack | Mix], ResidentAdapter],
        replay: Callable[[Pack, ResidentAdapter], Replay],
        budget: int,
    ) -> None:
        self._bundle, self._read, self._replay, self.budget = bundle, read, replay, budget
        self._packs = dict(bundle.packs)
        self._names = Counter(pack.id for pack in self._packs.values())
        """Digest -> the number of its names."""
        self._admitted = set(self._names)
        """The digests of the packs that have passed admission."""
        self._listed: dict[str, Callable[[Pack], str | None]] = {}
        """Digests of packs that were listed -> the checks of admission, with their options."""
        self._refused: dict[str, AdapterpackError] = {}
        """Why packs that were only listed were refused when a row first asked for them, by digest."""
        self._admitting = threading.Lock()
        self._lock = threading.Lock()
        self._resident: OrderedDict[str, ResidentAdapter] = OrderedDict()
        self._reading: dict[str, threading.Event] = {}
        """Digest -> an event that is set once the adapter has been read, or reading has failed."""
        self._pinned: set[str] = set()

    @property
    def names(self) -> list[str]:
        """The names that requests may use, sorted."""
        return sorted(self._packs)

    def pack(self, name: str) -> Pack:
        """Returns the pack that has a name now.

        Raises:
            UnknownAdapter: no pack has the name.
        """
        pack = self._packs.get(name)
        if pack is None:
            raise self._unknown(name)
        return pack

    def _unknown(self, name: str) -> UnknownAdapter:
        return UnknownAdapter(
            "the engine has no such adapter",
            where=self._bundle.given,
            found=repr(name),
            remedy=nearest(name, self._packs),
        )

    def of_row(self, adapter: Named) -> Pack | Mix | None:
        """Resolves the adapter of a row. A name gives its pack; a mapping of names to weights gives a mix; a
        pack without a name here is admitted first. None gives the base, or the adapter that is folded into
        it.

        Raises:
            UnknownAdapter: no adapter has that name.
            AdapterpackError: the pack may not run here; see :meth:`load`.
            ConfigError, NotASum: the adapters do not form a mix; see :class:`.Mix`.
        """
        if adapter is None:
            return None if self._bundle.default is None else self._bundle.pack(self._bundle.default)
        if isinstance(adapter, str):
            return self.pack(adapter)
        if isinstance(adapter, Mapping):
            return combine((self.pack(name), weight) for name, weight in adapter.items())
        for pack, _ in parts_of(adapter):
            if pack.id not in self._admitted:
                reason = require_runnable(self._bundle, pack)
                with self._hold(pack) as held:
                    require_canary(self._bundle, pack, reason, partial(self._replay, pack, held))
                self._admitted.add(pack.id)
        return adapter

    def load(
        self,
        pack: Pack | StrPath,
        name: str | None = None,
        *,
        replace: bool = False,
        pin: bool = False,
        allow_structural: bool = False,
        signers: Signers | None = None,
    ) -> str:
        """Admits a pack by its signature, base, task, slots and canary, gives it a name, and returns its
        digest.

        ``replace`` permits a name that another pack has. ``pin`` keeps the adapter in memory.
        ``allow_structural`` accepts a base with the same names, dtypes and shapes. If ``signers`` are given,
        one of them must have signed the pack.

        A pack that was only listed gets its name now, and the checks of its bytes when a row first asks for
        it; in a bundle whose task has heads, whose labels any card tells, all are made now.

        Raises:
            AdapterpackError: the name is taken, or the pack may not run here.
        """
        loaded = as_pack(pack)
        loaded = loaded if name is None else loaded.called(name)
        trusted: dict[str, Any] = {"signers": signers, "allow_structural": allow_structural}
        verdict = require_outline(self._bundle, loaded, **trusted)
        self._require_free(loaded, replace)
        if isinstance(loaded, ListedPack) and not (pin or self._bundle.task.heads):
            with self._lock:
                self._require_free(loaded, replace)
                before = self._name(loaded.name, loaded)
                self._listed[loaded.id] = partial(require_runnable, self._bundle, **trusted)
                self._refused.pop(loaded.id, None)
        else:
            whole = loaded.read() if isinstance(loaded, ListedPack) else loaded
            with self._check(whole, partial(why_not_replayed, self._bundle, verdict)) as kept, self._lock:
                self._require_free(loaded, replace)
                before = self._name(loaded.name, kept)
                self._admitted.add(loaded.id)
                if pin:
                    self._pinned.add(loaded.id)
        if before is not None and before.id != loaded.id:
            self._drop(before.id)
        return loaded.id

    @contextmanager
    def _check(self, pack: Pack, runnable: Callable[[Pack], str | None]) -> Iterator[Pack]:
        """Makes the checks of a pack whose bytes were read, and yields it for a name while it is in
        memory.
        """
        reason = runnable(pack)
        with self._hold(pack) as held:
            require_canary(self._bundle, pack, reason, partial(self._replay, pack, held))
            yield pack.kept_open()

    def admit(self, pack: ListedPack) -> None:
        """Makes all checks of a pack that was only listed, unless they were made.

        Raises:
            UnknownAdapter: the pack has no name any more.
            AdapterpackError: the pack may not run here. It is said again at every call, until the pack is
                loaded again.
        """
        with self._admitting:
            if pack.id in self._admitted:
                return
            if pack.id in self._refused:
                raise self._refused[pack.id].with_traceback(None)
            if pack.id not in self._listed:
                raise self._unknown(pack.name)
            try:
                with self._check(pack.read(), self._listed[pack.id]) as kept, self._lock:
                    for name, other in self._packs.items():
                        if other.id == pack.id:
                            self._packs[name] = kept.called(name)
                    self._admitted.add(pack.id)
            except AdapterpackError as error:
                if not isinstance(error, StorageError):  # which may pass
                    self._refused[pack.id] = error
                raise error.with_traceback(None) from error.__cause__  # whose frames hold the pack

    def rename(self, name: str, other: str) -> None:
        """Gives an adapter another name.

        Raises:
            UnknownAdapter: no adapter has that name.
            ConfigError: the new name is not valid.
            AdapterpackError: another adapter has the new name.
        """
        with self._lock:
            pack = self.pack(name).called(other)
            self._require_free(pack, replace=name == other)
            self._name(name, None)
            self._name(other, pack)

    def unload(self, name: str) -> None:
        """Removes a name. The memory is freed once no row runs with the adapter.

        Raises:
            UnknownAdapter: no adapter has that name.
        """
        with self._lock:
            pack = self.pack(name)
            self._name(name, None)
        self._drop(pack.id)

    def _name(self, name: str, pack: Pack | None) -> Pack | None:
        """Assigns a name to a pack, or removes the name for None, and returns the pack that had it. A
        concurrent reader sees either the old pack or the new one.
        """
        before = self._packs.get(name)
        if before is not None:
            self._names[before.id] -= 1
            if not self._names[before.id]:
                del self._names[before.id]
        if pack is None:
            self._packs.pop(name, None)
        else:
            self._packs[name] = pack
            self._names[pack.id] += 1
        return before

    def _require_free(self, pack: Pack, replace: bool) -> None:
        if not replace and pack.name in self._packs:
            raise AdapterpackError(
                "the engine already has an adapter of that name",
                where=pack.name,
                remedy="choose another name, or load with replace=True",
            )

    def _drop(self, digest: str) -> None:
        with self._lock:
            if digest in self._names:  # another name still refers to it
                return
            self._pinned.discard(digest)
            self._admitted.discard(digest)
            self._listed.pop(digest, None)
            self._refused.pop(digest, None)
            for adapter in [one for one in self._resident.values() if digest in one.packs and not one.users]:
                del self._resident[adapter.digest]

    def acquire(self, pack: Pack | Mix) -> ResidentAdapter:
        """Returns the adapter for one more row and keeps it in memory until :meth:`release`. If several rows
        ask at once, one thread reads the pack and the others wait.

        Raises:
            AdapterpackError: the pack was only listed, and may not run here.
        """
        for part, _ in parts_of(pack):
            if isinstance(part, ListedPack):
                self.admit(part)
        while True:
            with self._lock:
                adapter = self._resident.get(pack.id)
                if adapter is not None:
                    adapter.users += 1
                    self._resident.move_to_end(pack.id)
                    return adapter
                reading = self._reading.get(pack.id)
                if reading is None:
                    ours = self._reading[pack.id] = threading.Event()
                    break
            reading.wait()
        try:
            adapter = self._read(pack)
            with self._lock:
                adapter.users += 1
                self._resident[pack.id] = adapter
                self._evict()
                return adapter
        finally:
            with self._lock:
                del self._reading[pack.id]
            ours.set()

    @contextmanager
    def _hold(self, pack: Pack) -> Iterator[ResidentAdapter]:
        adapter = self.acquire(pack)
        try:
            yield adapter
        finally:
            self.release(adapter)

    def release(self, adapter: ResidentAdapter) -> None:
        """Records that a row no longer uses the adapter."""
        with self._lock:
            # A row may outlive the name of its pack; its adapter is dropped with the last such row.
            adapter.users -= 1
            unnamed = not adapter.packs <= self._names.keys()
            if not adapter.users and unnamed and self._resident.get(adapter.digest) is adapter:
                del self._resident[adapter.digest]
            self._evict()

    def pin(self, name: str) -> None:
        """Reads an adapter if it is not in memory, and keeps it there."""
        pack = self.pack(name)
        adapter = self.acquire(pack)
        with self._lock:
            self._pinned.add(pack.id)
        self.release(adapter)

    def unpin(self, name: str) -> None:
        """Permits the eviction of an adapter again."""
        pack = self.pack(name)
        with self._lock:
            self._pinned.discard(pack.id)
            self._evict()

    @property
    def nbytes(self) -> int:
        """The bytes of all resident adapters; arrays that several share count once."""
        with self._lock:
            return self._total()

    def _total(self) -> int:
        shared: dict[int, int] = {}
        for adapter in self._resident.values():
            shared |= adapter.shared_nbytes
        return sum(adapter.nbytes for adapter in self._resident.values()) + sum(shared.values())

    @property
    def digests(self) -> list[str]:
        """The digests of the resident adapters, the least recently used first."""
        with self._lock:
            return list(self._resident)

    def _evict(self) -> None:
        total = self._total()
        if total <= self.budget:
            return
        idle = [one for one in self._resident.values() if not one.users and one.digest not in self._pinned]
        running_mixes = sum(one.nbytes for one in self._resident.values() if one.mixed and one.users)
        # Idle mixes go first. A running mix does not count against packs: it would evict packs that other
        # requests name.
        for adapter in sorted(idle, key=lambda one: not one.mixed):
            if total <= self.budget + (0 if adapter.mixed else running_mixes):
                return
            del self._resident[adapter.digest]
            total -= adapter.nbytes
