"""The adapters with which a server starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import ConfigError, NothingToDo
from ...fleet.fleet import Fleet
from ...fleet.manifest import FILE_NAME
from ...hub import folder_of
from ...pack import Pack
from ...pack.validate import list_pack
from ...paths import StrPath
from .adapter_control import AdapterControl
from .adapter_source import AdapterSource, is_pack, listed_source


def _members(folder: Path) -> Sequence[Pack | Path]:
    """Returns the members of a fleet, or the path itself if it is no fleet."""
    if not (folder / FILE_NAME).is_file():
        return [folder]
    fleet = Fleet.load(folder)
    return [fleet.pack(name) for name in fleet.names]


class StartupAdapters(NamedTuple):
    """Single packs, and sources that list packs: folders and lock files."""

    packs: Sequence[Pack | Path]
    sources: Sequence[AdapterSource]

    @classmethod
    def of(cls, adapters: Sequence[Pack | StrPath]) -> StartupAdapters:
        """Sorts paths into packs and sources: a file is a lock file, a fleet counts as all its members, and
        a folder that is no pack is a folder of packs.
        """
        given = [
            one
            for adapter in adapters
            for one in ([adapter] if isinstance(adapter, Pack) else _members(folder_of(adapter)))
        ]
        return cls(
            [one for one in given if isinstance(one, Pack) or is_pack(one)],
            [listed_source(one) for one in given if not isinstance(one, Pack) and not is_pack(one)],
        )

    def load(self, control: AdapterControl, *, changing: bool, watched: bool) -> None:
        """Loads the packs, and those of the sources unless these are ``watched``, in which case the watcher
        loads them. A source may be empty only if adapters can be loaded later (``changing``).

        Raises:
            ConfigError: there is no source to watch.
            NothingToDo: a source has no pack.
        """
        if watched and not self.sources:
            raise ConfigError(
                "there is no folder to watch",
                remedy="name a folder of packs, or a lock file, with --adapters",
            )
        for source in self.sources:
            if not source.packs() and not changing:
                raise NothingToDo(
                    "there is no adapter in this folder or lock file",
                    where=source,
                    expected="a pack, a folder of packs, or a lock file that pins packs",
                )
            for place, pack in () if watched else source.at_start():
                control.add(pack, place)
        for one in self.packs:
            control.add(one if isinstance(one, Pack) else list_pack(one))
