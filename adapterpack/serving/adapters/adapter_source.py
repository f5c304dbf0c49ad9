"""Interfaces for the places from which a server gets packs, and for changes there."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Protocol

from ...errors import ConfigError, UnknownAdapter
from ...pack.pack import Pack

PlaceState = Hashable
"""Differs from an earlier state of the same place whenever its pack may have changed."""


class PackPlace(Hashable, Protocol):
    """The place of one pack. Its string form appears in the log."""

    @property
    def name(self) -> str:
        """The name that operators use for it."""

    def pack(self) -> Pack:
        """Loads the current pack of the place.

        Raises:
            AdapterpackError: there is no pack that can be loaded.
        """


class AdapterSource(Protocol):
    """A source that lists places: a folder of packs, or a lock file."""

    def packs(self) -> Mapping[PackPlace, PlaceState]:
        """Returns the current places and their states.

        Raises:
            AdapterpackError: the places cannot be listed.
        """

    def at_start(self) -> Iterator[tuple[PackPlace, Pack]]:
        """Yields all packs, for a server that starts with them. An invalid pack raises."""


class AdapterSources:
    """The combined places of several sources."""

    def __init__(self, sources: Sequence[AdapterSource]) -> None:
        self._sources = tuple(sources)

    def packs(self) -> dict[PackPlace, PlaceState]:
        """Returns the current places of all sources and their states.

        Raises:
            AdapterpackError: a source cannot list its places.
        """
        return {place: state for source in self._sources for place, state in source.packs().items()}

    def find(self, name: str) -> PackPlace:
        """Returns the place with a name. The name is only compared, never joined to a path or sent to a hub,
        since requests supply it.

        Raises:
            UnknownAdapter: no place has the name.
            ConfigError: several places have it.
        """
        places = [place for place in self.packs() if place.name == name]
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
