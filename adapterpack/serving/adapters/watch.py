"""Watches folders of packs: what is dropped in is loaded, what changes is exchanged, what is removed is unloaded."""

from __future__ import annotations

import logging
from pathlib import Path

from ...errors import AdapterpackError
from .adapter_control import AdapterControl
from .pack_folders import Fingerprint

_LOG = logging.getLogger("adapterpack.serving")


class Watch:
    """Compares the folders of an :class:`.AdapterControl` with what they were.

    A pack that is being written, or removed, is left alone until two looks see the same of it.
    """

    def __init__(self, control: AdapterControl) -> None:
        self._control = control
        self._before: dict[Path, Fingerprint] = {}
        self._done: dict[Path, Fingerprint] = {}
        self._fault = ""

    def look(self, *, at_once: bool = False) -> None:
        """Takes up what has changed and is still now; ``at_once``: whatever there is. Folders that cannot be listed change nothing."""
        try:
            now = self._control.folders.packs()
        except AdapterpackError as error:
            if str(error) != self._fault:
                _LOG.error("the adapters stay as they are: %s", error)
            self._fault = str(error)
            return
        self._fault = ""
        for folder in sorted({*now, *self._done}):
            state = now.get(folder)
            if state == self._done.get(folder) or not (at_once or state == self._before.get(folder)):
                continue
            if state is None:
                self._control.leave(folder)
                del self._done[folder]
            else:
                self._control.follow(folder)
                self._done[folder] = state
        self._before = now
