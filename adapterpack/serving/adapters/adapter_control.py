"""Loads, exchanges and unloads the adapters of a server, and remembers which packs it refused."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

from ...errors import AdapterpackError, ConfigError, HubError
from ...pack.pack import Pack
from ...pack.trust.signers import Signers
from ...runtime.engine.adapter_table import AdapterTable
from .adapter_source import AdapterSources, PackPlace
from .pack_folders import InFolder

MOST_REFUSED = 100
"""Refused packs that are remembered, the oldest forgotten first."""
Change = Literal["loaded", "replaced", "unloaded", "refused"]
_LOG = logging.getLogger("adapterpack.serving")


class NameTaken(ConfigError):
    """Another adapter, or the base, has the name already."""

    code = "name-taken"


class ServedAdapter(NamedTuple):
    """An adapter that requests may name. ``generation`` counts the packs that have had its name; ``own_name``
    is what its pack calls itself, and ``place`` where that comes from.
    """

    name: str
    digest: str
    generation: int
    own_name: str
    place: PackPlace | None
    loaded: float


class Refusal(NamedTuple):
    """Why the pack at a place was not loaded: the code of the error, and the error."""

    place: PackPlace
    reason: str
    message: str
    time: float


class AdapterControl:
    """The one that changes an engine's adapters while it runs. Any thread may call it; one change is made at
    a time.

    A request keeps the pack that it was bound to when it arrived, so an exchange concerns those that arrive
    later. ``base`` is the name that no adapter may have. ``changed`` hears of every change, with the code of
    the error where a pack was refused.
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
        """Held while a change is made, which reads packs and replays canaries."""
        self._glance = threading.Lock()
        """Held while what follows is looked at or written, and no longer: the loop of a server looks, too."""
        self._generations: Counter[str] = Counter()
        self._adapters: dict[str, ServedAdapter] = {}
        self._refused: OrderedDict[PackPlace, Refusal] = OrderedDict()
        for name in table.names:  # those of the bundle
            self._note(table.pack(name), None)

    @property
    def adapters(self) -> list[ServedAdapter]:
        """Those that requests may name."""
        with self._glance:
            return sorted(self._adapters.values())

    @property
    def refused(self) -> list[Refusal]:
        """The packs at watched places that were not loaded, the newest last."""
        with self._glance:
            return list(self._refused.values())

    def add(self, pack: Pack, place: PackPlace | None = None) -> ServedAdapter:
        """Loads a pack under the name that it has. The same pack under that name, as of the bundle, is no
        other one.

        Raises:
            NameTaken: another has it, or the base.
            TrustError: a signature is needed, and it has none of the right ones.
            AdapterpackError: as :meth:`.AdapterTable.load`.
        """
        with self._lock:
            holder = self._adapters.get(pack.name)
            return self._add(pack, holder is not None and holder.digest == pack.id, place)

    def load(self, source: str, name: str, *, replace: bool = False) -> ServedAdapter:
        """Loads the pack whose place is called ``source`` under a name; ``replace``: another may have it now,
        which is exchanged.

        Raises:
            UnknownAdapter: no place is called that.
            AdapterpackError: as :meth:`add`, and for what is wrong with the pack.
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
        """Takes a name away.

        Raises:
            UnknownAdapter: no adapter has it.
        """
        with self._lock:
            return self._remove(name)

    def follow(self, place: PackPlace, leaving: Collection[PackPlace] = ()) -> bool:
        """The pack at a place is new, or has changed: loads it under its name, and under those that an
        operator gave it. It may take over the names of places that are ``leaving``. One that is refused is
        remembered, and what was loaded of the place before goes on.

        False where it is worth another try although nothing has changed: a hub could not be reached.
        """
        try:
            pack = place.pack()  # others may ask meanwhile: a hub can be slow
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
        """The pack at a place has gone: unloads what was loaded of it."""
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
        """As :meth:`_add`, and says so in the log: from now on another pack answers."""
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
