"""Where the packs of a server come from, and what changes there."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Protocol

from ...errors import ConfigError, UnknownAdapter
from ...pack.pack import Pack

PlaceState = Hashable
"""Another one whenever the pack at a place may have changed."""


class PackPlace(Hashable, Protocol):
    """Where one pack comes from; as text, what the log calls it."""

    @property
    def name(self) -> str:
        """What an operator calls it."""

    def pack(self) -> Pack:
        """The pack that is there now.

        Raises:
            AdapterpackError: there is none that can be loaded.
        """


class AdapterSource(Protocol):
    """Something that lists places: a folder of packs, or a lock file."""

    def packs(self) -> Mapping[PackPlace, PlaceState]:
        """The places now.

        Raises:
            AdapterpackError: they cannot be listed.
        """

    def at_start(self) -> Iterator[tuple[PackPlace, Pack]]:
        """All packs, for a server that begins with them; an error in one is an error."""


class AdapterSources:
    """The places of several sources."""

    def __init__(self, sources: Sequence[AdapterSource]) -> None:
        self._sources = tuple(sources)

    def packs(self) -> dict[PackPlace, PlaceState]:
        """The places now.

        Raises:
            AdapterpackError: those of a source cannot be listed.
        """
        return {place: state for source in self._sources for place, state in source.packs().items()}

    def find(self, name: str) -> PackPlace:
        """The one place of a name, which is looked up, and never joined to a path or sent to a hub.

        Raises:
            UnknownAdapter: none has it.
            ConfigError: several have.
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
