"""Loads, replaces and unloads the adapters of a running server, and remembers which packs it refused."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

from ...errors import AdapterpackError, ConfigError, HubError
from ...pack.pack import Pack
from ...pack.trust.sign import Signers
from ...runtime.engine.adapter_table import AdapterTable
from .adapter_source import AdapterSources, PackPlace
from .pack_folders import InFolder

MOST_REFUSED = 100
"""The most refused packs that are remembered; the oldest are dropped first."""
Change = Literal["loaded", "replaced", "unloaded", "refused"]
_LOG = logging.getLogger("adapterpack.serving")


class NameTaken(ConfigError):
    """Another adapter, or the base, already has the name."""

    code = "name-taken"


class ServedAdapter(NamedTuple):
    """An adapter that requests may name. ``generation`` counts the packs that have had its name; ``own_name``
    is the name in its manifest, and ``place`` is where the pack comes from.
    """

    name: str
    digest: str
    generation: int
    own_name: str
    place: PackPlace | None
    loaded: float


class Refusal(NamedTuple):
    """Why the pack at a place was not loaded: the code of the error, and its message."""

    place: PackPlace
    reason: str
    message: str
    time: float


class AdapterControl:
    """Changes the adapters of an engine while it runs, one change at a time. Any thread may call it.

    A request keeps the pack to which it was bound on arrival, so a replacement affects later requests only.
    No adapter may have the name ``base``. ``changed`` is called for every change; for a refused pack with the
    error's code.
    """

    def __init__(
        self,
        table: AdapterTable,
        base: str,
        places: AdapterSources,
        signers: Signers,
        changed: Callable[[Change, str], None],
    ) -> None:
        self._table, self._base, self.places, self._signers, self._changed = (
            table,
            base,
            places,
            signers,
            changed,
        )
        self._lock = threading.Lock()
        """Held during a change, which reads packs and replays canaries and may take long."""
        self._glance = threading.Lock()
        """Guards the fields below. Held only briefly, because the server's event loop takes it, too."""
        self._generations: Counter[str] = Counter()
        self._adapters: dict[str, ServedAdapter] = {}
        self._refused: OrderedDict[PackPlace, Refusal] = OrderedDict()
        for name in table.names:  # the adapters of the bundle itself
            self._note(table.pack(name), None)

    @property
    def adapters(self) -> list[ServedAdapter]:
        """The adapters that requests may name."""
        with self._glance:
            return sorted(self._adapters.values())

    @property
    def refused(self) -> list[Refusal]:
        """The packs at watched places that were not loaded, the newest last."""
        with self._glance:
            return list(self._refused.values())

    def add(self, pack: Pack, place: PackPlace | None = None) -> ServedAdapter:
        """Loads a pack under its own name. Loading the same pack under the same name again changes nothing.

        Raises:
            NameTaken: another adapter, or the base, has the name.
            TrustError: a signature is required, and none of the required keys signed the pack.
            AdapterpackError: see :meth:`.AdapterTable.load`.
        """
        with self._lock:
            holder = self._adapters.get(pack.name)
            return self._add(pack, holder is not None and holder.digest == pack.id, place)

    def load(self, source: str, name: str, *, replace: bool = False) -> ServedAdapter:
        """Loads the pack from the place called ``source`` under a name. With ``replace`` it may take the name
        of another adapter.

        Raises:
            UnknownAdapter: no place has the name ``source``.
            AdapterpackError: the pack is not valid, or see :meth:`add`.
        """
        try:
            place = self.places.find(source)
            pack = place.pack().called(name)
            with self._lock:
                return self._exchange(pack, replace, place)
        except AdapterpackError as error:
            self._changed("refused", error.code)
            raise

    def unload(self, name: str) -> ServedAdapter:
        """Removes a name.

        Raises:
            UnknownAdapter: no adapter has it.
        """
        with self._lock:
            return self._remove(name)

    def follow(self, place: PackPlace, leaving: Collection[PackPlace] = ()) -> bool:
        """Loads a pack at a place that is new or has changed, under its own name and under the names that an
        operator gave it.

        It may take over the names of places that are ``leaving``. A refused pack is remembered, and the
        previous pack of the place stays loaded. Returns False if a retry may help although nothing changes,
        as when a hub is unreachable.
        """
        try:
            pack = place.pack()  # without the lock, since a hub can be slow
            with self._lock:
                self._follow(pack, place, leaving)
                self._accept(place)
        except AdapterpackError as error:
            self._refuse(place, error.code, error.sentence)
            return not isinstance(error, HubError)
        except Exception as error:
            _LOG.exception("a bug in adapterpack: the pack %s could not be looked at", place)
            self._refuse(place, "bug", repr(error))
        return True

    def leave(self, place: PackPlace) -> None:
        """Unloads the adapters of a place whose pack is gone."""
        with self._lock:
            self._accept(place)
            for one in self._of(place):
                self._remove(one.name)

    def _follow(self, pack: Pack, place: PackPlace, leaving: Collection[PackPlace]) -> None:
        before, faults = self._of(place), list[AdapterpackError]()
        given = {one.name for one in before if one.name != one.own_name}
        for name in (pack.name, *sorted(given - {pack.name})):
            holder = self._adapters.get(name)
            replace = holder is not None and (holder.place == place or holder.place in leaving)
            try:
                self._exchange(pack if name == pack.name else pack.called(name), replace, place)
            except AdapterpackError as error:
                faults.append(error)
        if faults:
            raise faults[0]
        for one in before:
            if one.name not in {pack.name, *given}:
                self._remove(one.name)

    def _add(self, pack: Pack, replace: bool, place: PackPlace | None) -> ServedAdapter:
        if pack.name == self._base or (pack.name in self._adapters and not replace):
            raise NameTaken(
                "the base or another adapter has this name already",
                where=pack.path,
                found=pack.name,
                remedy='choose another name, or exchange an adapter with "load_inplace": true',
            )
        self._table.load(pack, replace=True, signers=self._signers)
        before = self._adapters.get(pack.name)
        after = self._note(pack, place)
        if before is None or before.generation != after.generation:
            self._changed("loaded" if before is None else "replaced", "")
        return after

    def _exchange(self, pack: Pack, replace: bool, place: PackPlace) -> ServedAdapter:
        """Does what :meth:`_add` does, and logs the change."""
        before, after = self._adapters.get(pack.name), self._add(pack, replace, place)
        if before is None or before.generation != after.generation:
            _LOG.warning(
                "loaded the adapter %s, generation %d, %s", after.name, after.generation, after.digest
            )
        return after

    def _note(self, pack: Pack, place: PackPlace | None) -> ServedAdapter:
        before = self._adapters.get(pack.name)
        if place is None and pack.path is not None:
            place = InFolder(pack.path)
        if before is None or before.digest != pack.id:
            self._generations[pack.name] += 1
        adapter = ServedAdapter(
            pack.name, pack.id, self._generations[pack.name], pack.manifest.pack.name, place, time.time()
        )
        with self._glance:
            self._adapters[pack.name] = adapter
        return adapter

    def _remove(self, name: str) -> ServedAdapter:
        self._table.unload(name)
        with self._glance:
            adapter = self._adapters.pop(name)
        self._changed("unloaded", "")
        _LOG.warning("unloaded the adapter %s, generation %d", name, adapter.generation)
        return adapter

    def _of(self, place: PackPlace) -> list[ServedAdapter]:
        return [one for one in self._adapters.values() if one.place == place]

    def _accept(self, place: PackPlace) -> None:
        with self._glance:
            self._refused.pop(place, None)

    def _refuse(self, place: PackPlace, reason: str, message: str) -> None:
        with self._glance:
            before = self._refused.pop(place, None)
            self._refused[place] = Refusal(place, reason, message, time.time())
            while len(self._refused) > MOST_REFUSED:
                self._refused.popitem(last=False)
        if before is None or (before.reason, before.message) != (reason, message):
            self._changed("refused", reason)
            _LOG.error("refused the pack %s (%s): %s", place, reason, message)
