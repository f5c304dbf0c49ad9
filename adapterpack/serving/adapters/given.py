"""The adapters that a server is started with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import ConfigError, NothingToDo
from ...hub.resolve import folder_of
from ...pack.pack import Pack
from ...pack.validate.validation import load
from .adapter_control import AdapterControl
from .pack_folders import is_pack, packs_in


class Given(NamedTuple):
    """Packs, and folders of packs."""

    packs: Sequence[Pack | Path]
    folders: Sequence[Path]

    @classmethod
    def of(cls, adapters: Sequence[Pack | str | os.PathLike[str]]) -> Given:
        """These; what is no pack is a folder of packs."""
        found = [adapter if isinstance(adapter, Pack) else folder_of(adapter) for adapter in adapters]
        return cls([one for one in found if isinstance(one, Pack) or is_pack(one)],
                   [one for one in found if not isinstance(one, Pack) and not is_pack(one)])

    def load(self, control: AdapterControl, *, changing: bool, watched: bool) -> None:
        """Loads the packs, and those in the folders unless these are watched. Where adapters may come later a folder may be empty.

        Raises:
            ConfigError: there is no folder to watch.
            NothingToDo: there is no pack in a folder.
        """
        if watched and not self.folders:
            raise ConfigError("there is no folder to watch", remedy="name a folder of packs with --adapters")
        for folder in self.folders:
            inside = list(packs_in(folder))
            if not inside and not changing:
                raise NothingToDo("there is no adapter in this folder", where=folder, expected="a pack, or a folder of packs")
            for pack in () if watched else inside:
                control.add(load(pack))
        for one in self.packs:
            control.add(one if isinstance(one, Pack) else load(one))
