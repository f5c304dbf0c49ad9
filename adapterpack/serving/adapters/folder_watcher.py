"""Watches the places of packs: loads new packs, replaces changed ones, and unloads removed ones."""

from __future__ import annotations

import logging

from ...errors import AdapterpackError
from .adapter_control import AdapterControl
from .adapter_source import PackPlace, PlaceState

_AGAIN = object()
"""The state of a place that should be tried again."""
_LOG = logging.getLogger("adapterpack.serving")


class FolderWatcher:
    """Compares the places of an :class:`.AdapterControl` with their earlier states.

    A pack that is being written or removed is left alone until two consecutive looks see the same state.
    """

    def __init__(self, control: AdapterControl) -> None:
        self._control = control
        self._before: dict[PackPlace, PlaceState] = {}
        self._done: dict[PackPlace, PlaceState] = {}
        self._fault = ""

    def look(self, *, at_once: bool = False) -> None:
        """Applies all changes that are stable by now; with ``at_once`` even those that may not be. If a
        source cannot be listed, nothing changes.
        """
        try:
            now = self._control.places()
        except AdapterpackError as error:
            if str(error) != self._fault:
                _LOG.error("the adapters stay as they are: %s", error)
            self._fault = str(error)
            return
        self._fault = ""
        changed = [
            place
            for place in {**now, **self._done}
            if now.get(place) != self._done.get(place)
            and (at_once or now.get(place) == self._before.get(place))
        ]
        gone = {place for place in changed if place not in now}
        for place in sorted(changed, key=str):
            if place not in gone:
                self._done[place] = now[place] if self._control.follow(place, gone) else _AGAIN
        # Only now, after others took over their names, so that no name is missing in between.
        for place in sorted(gone, key=str):
            self._control.leave(place)
            del self._done[place]
        self._before = now
