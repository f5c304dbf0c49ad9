"""Loads, replaces and unloads the adapters of a running server, and remembers which packs it refused."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Literal, NamedTuple

from ...errors import AdapterpackError, ConfigError, HubError, UnknownAdapter
from ...io import FrozenStruct
from ...pack import Pack, TextIndex, TextProfile
from ...pack.trust import Signers
from ...pack.validate import ListedPack
from ...runtime.engine import AdapterTable
from .adapter_source import AdapterSource, InFolder, NamedSource, PackPlace, PlaceState

MOST_REFUSED = 100
"""The most refused packs that are remembered; the oldest are dropped first."""
Change = Literal["loaded", "replaced", "unloaded", "refused"]
_LOG = logging.getLogger("adapterpack.serving")


class NameTaken(ConfigError):
    """Another adapter, or the base, already has the name."""

    code = "name-taken"


class Facts(FrozenStruct):
    """A summary of a pack: its method, the smallest and largest rank of its sites, the number of sites, their
    modules, and its bytes.
    """

    method: str
    ranks: tuple[int, int] | None
    sites: int
    modules: list[str]
    bytes: int


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that requests may name. ``generation`` counts the packs that have had its name, and
    ``place`` is where the pack comes from.
    """

    pack: Pack
    generation: int
    place: PackPlace | None
    loaded: datetime

    @property
    def name(self) -> str:
        """The name that requests use."""
        return self.pack.name

    @property
    def digest(self) -> str:
        """The digest of its pack."""
        return self.pack.id

    @cached_property
    def facts(self) -> Facts:
        """The summary of its pack, computed once, from its outline."""
        known = self.pack.outline
        ranks = [group.rank for group in known.groups if group.rank is not None]
        changed = [(group.role, group.path) for group in known.groups if group.role != "shared"]
        return Facts(
            " + ".join(dict.fromkeys((group.method or known.method).type for group in known.groups)),
            (min(ranks), max(ranks)) if ranks else None,
            sum(role == "adapter" for role, _ in changed),
            list(dict.fromkeys(path.rpartition(".")[2] for _, path in changed)),
            sum(entry.size for entry in known.files if entry.role == "tensors"),
        )


class Refusal(NamedTuple):
    """Why the pack at a place was not loaded: the code of the error, and its message."""

    place: PackPlace
    reason: str
    message: str
    time: datetime


class AdapterControl:
    """Changes the adapters of an engine while it runs, one change at a time. Any thread may call it.

    A request keeps the pack to which it was bound on arrival, so a replacement affects later requests only.
    No adapter may have the name ``base``. ``changed`` is called for every change; for a refused pack with the
    error's code. ``texts`` knows what texts the adapters were trained on, as far as their packs tell.
    """

    def __init__(
        self,
        table: AdapterTable,
        base: str,
        sources: Sequence[AdapterSource],
        signers: Signers,
        changed: Callable[[Change, str], None],
    ) -> None:
        self._table = table
        self._base = base
        self._sources = tuple(sources)
        self._signers, self._changed = signers, changed
        self._lock = threading.Lock()
        """Held during a change, which reads packs and replays canaries and may take long."""
        self._glance = threading.Lock()
        """Guards the fields below. Held only briefly, because the server's event loop takes it, too."""
        self.texts = TextIndex()
        self._generations: Counter[str] = Counter()
        self._adapters: dict[str, ServedAdapter] = {}
        self._refused: OrderedDict[PackPlace, Refusal] = OrderedDict()
        for name in table.names:  # the adapters of the bundle itself
            self._note(table.pack(name), None)

    @property
    def adapters(self) -> list[ServedAdapter]:
        """The adapters that requests may name."""
        with self._glance:
            return [self._adapters[name] for name in sorted(self._adapters)]

    @property
    def refused(self) -> list[Refusal]:
        """The packs at watched places that were not loaded, the newest last."""
        with self._glance:
            return list(self._refused.values())

    def places(self) -> dict[PackPlace, PlaceState]:
        """Returns the current places of all sources, and their states.

        Raises:
            AdapterpackError: a source cannot list its places.
        """
        return {place: state for source in self._sources for place, state in source.packs().items()}

    def add(self, pack: Pack, place: PackPlace | None = None) -> ServedAdapter:
        """Loads a pack under its own name. Loading the same pack under the same name again changes nothing.

        Raises:
            NameTaken: another adapter, or the base, has the name.
            TrustError: a signature is required, and none of the required keys signed the pack.
            AdapterpackError: see :meth:`.AdapterTable.load`.
        """
        with self._lock:
            holder = self._adapters.get(pack.name)
            return self._add(pack, holder is not None and holder.digest == pack.id, place, log=False)

    def load(
        self,
        source: str,
        name: str,
        *,
        replace: bool = False,
        sources: Sequence[NamedSource] | None = None,
    ) -> ServedAdapter:
        """Loads the pack from the place called ``source`` under a name. With ``replace`` it may take the name
        of another adapter; ``sources`` are others than those of the server.

        Raises:
            UnknownAdapter: no place has the name ``source``.
            AdapterpackError: the pack is not valid, or see :meth:`add`.
        """
        try:
            place = self._find(source, self._sources if sources is None else sources)
            pack = place.pack().called(name)
            with self._lock:
                return self._add(pack, replace, place)
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

    def has(self, name: str) -> bool:
        """Returns whether the base or an adapter has the name."""
        return name == self._base or name in self._adapters

    def adapter_of(self, model: str) -> str:
        """Returns the name of the adapter in the name of a model, which may begin with the base's."""
        return model.removeprefix(f"{self._base}:")

    def awaits_checks(self, name: str) -> bool:
        """Whether an adapter was only listed, so that :meth:`admit` has to check it."""
        one = self._adapters.get(name)
        return one is not None and isinstance(one.pack, ListedPack)

    def admit(self, name: str) -> None:
        """Makes the checks of an adapter that was only listed; one that fails them is remembered as refused.

        Raises:
            AdapterpackError: the adapter may not run.
        """
        with self._lock:
            one = self._adapters.get(name)
            if one is None or not isinstance(one.pack, ListedPack):
                return
            try:
                self._table.admit(one.pack)
            except AdapterpackError as error:
                if one.place is not None:
                    self._refuse(one.place, error.code, error.sentence)
                raise
            for other in self._of(one.place):
                self._note(self._table.pack(other.name), other.place)

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

    def _find(self, name: str, sources: Sequence[NamedSource]) -> PackPlace:
        """Returns the place with a name. The name is only compared, never joined to a path, since requests
        supply it.

        Raises:
            UnknownAdapter: no place has the name.
            ConfigError: several places have it.
        """
        places = [place for one in sources if (place := one.find(name)) is not None]
        if not places:
            raise UnknownAdapter(
                "no pack in the folders or lock files of adapters has this name",
                found=repr(name[:200]),
                expected="the name of a pack's folder, and no path; or an entry of a lock file",
            )
        if len(places) > 1:
            raise ConfigError(
                "several packs in the folders of adapters have this name",
                found=repr(name),
                remedy="rename one of the folders",
            )
        return places[0]

    def _follow(self, pack: Pack, place: PackPlace, leaving: Collection[PackPlace]) -> None:
        before = self._of(place)
        faults = []
        given = {one.name for one in before if one.name != one.pack.outline.pack.name}
        for name in (pack.name, *sorted(given - {pack.name})):
            holder = self._adapters.get(name)
            replace = holder is not None and (holder.place == place or holder.place in leaving)
            try:
                self._add(pack if name == pack.name else pack.called(name), replace, place)
            except AdapterpackError as error:
                faults.append(error)
        if faults:
            raise faults[0]
        for one in before:
            if one.name not in {pack.name, *given}:
                self._remove(one.name)

    def _add(self, pack: Pack, replace: bool, place: PackPlace | None, *, log: bool = True) -> ServedAdapter:
        if pack.name == self._base or (pack.name in self._adapters and not replace):
            raise NameTaken(
                "the base or another adapter has this name already",
                where=pack.path,
                found=pack.name,
                remedy='choose another name, or exchange an adapter with "load_inplace": true',
            )
        TextProfile.of(pack)
        self._table.load(pack, replace=True, signers=self._signers)
        before = self._adapters.get(pack.name)
        after = self._note(self._table.pack(pack.name), place)  # which has its tensors on disk
        if before is None or before.generation != after.generation:
            self._changed("loaded" if before is None else "replaced", "")
            if log:
                _LOG.warning(
                    "loaded the adapter %s, generation %d, %s", after.name, after.generation, pack.id
                )
        return after

    def _note(self, pack: Pack, place: PackPlace | None) -> ServedAdapter:
        before = self._adapters.get(pack.name)
        if place is None and pack.path is not None:
            place = InFolder(pack.path)
        if before is None or before.digest != pack.id:
            self._generations[pack.name] += 1
        adapter = ServedAdapter(pack, self._generations[pack.name], place, _now())
        self.texts.put(pack.name, TextProfile.of(pack))
        with self._glance:
            self._adapters[pack.name] = adapter
        return adapter

    def _remove(self, name: str) -> ServedAdapter:
        self._table.unload(name)
        self.texts.put(name, None)
        with self._glance:
            adapter = self._adapters.pop(name)
        self._changed("unloaded", "")
        _LOG.warning("unloaded the adapter %s, generation %d", name, adapter.generation)
        return adapter

    def _of(self, place: PackPlace | None) -> list[ServedAdapter]:
        return [one for one in self._adapters.values() if one.place == place]

    def _accept(self, place: PackPlace) -> None:
        with self._glance:
            self._refused.pop(place, None)

    def _refuse(self, place: PackPlace, reason: str, message: str) -> None:
        with self._glance:
            before = self._refused.pop(place, None)
            self._refused[place] = Refusal(place, reason, message, _now())
            while len(self._refused) > MOST_REFUSED:
                self._refused.popitem(last=False)
        if before is None or (before.reason, before.message) != (reason, message):
            self._changed("refused", reason)
            _LOG.error("refused the pack %s (%s): %s", place, reason, message)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
