"""Loads adapters when a request first names them, from the sources that the operator allows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

from ...errors import AdapterpackError, RepoNotFound, UnknownAdapter
from ...http import HTTPError
from ...manifest import NAME
from ..tenants import Key
from .adapter_control import AdapterControl
from .adapter_source import NamedSource

MOST = 1000
"""The most adapters that stay loaded because requests named them; the least recently named goes first."""
_AT_ONCE = 32
"""The most adapters that load or wait for it."""
_ABSENT_SECONDS = 10.0
"""For how long a name that no source has is not looked for again."""
_LOG = logging.getLogger("adapterpack.serving")


class OnRequest:
    """Loads adapters by name beside the event loop, two at a time. However many requests name one at once, it
    is loaded once. Without ``sources`` nothing is.
    """

    def __init__(self, control: AdapterControl, sources: Sequence[NamedSource]) -> None:
        self._control, self._sources = control, sources
        self._turns = asyncio.Semaphore(2)
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._fetched = OrderedDict[str, None]()
        self._absent = OrderedDict[str, float]()

    async def ensure(self, name: str, key: Key) -> None:
        """Loads the adapter with a name if the key may use it, no model has the name yet, and a source has
        it; and checks one that was only listed.

        Raises:
            HTTPError: too many adapters are loading, or the listed one is refused.
        """
        name = self._control.adapter_of(name)
        if name in self._fetched:
            self._fetched.move_to_end(name)
        absent = self._absent.get(name, 0.0) > time.monotonic()
        new = self._sources and NAME.fullmatch(name) and not absent and not self._control.has(name)
        if not (key.may(name) and (new or self._control.awaits_checks(name))):
            return
        if name not in self._loading:
            if len(self._loading) >= _AT_ONCE:
                raise HTTPError(429, "rate_limit_exceeded", "too many adapters are loading", retry_after=1)
            task = self._loading[name] = asyncio.create_task(self._load(name))
            task.add_done_callback(lambda _: self._loading.pop(name))
        await asyncio.shield(self._loading[name])

    async def _load(self, name: str) -> None:
        if self._control.awaits_checks(name):
            try:
                async with self._turns:
                    await asyncio.to_thread(self._control.admit, name)
            except AdapterpackError as error:
                what = f"the adapter {name!r} was refused: {error.what}"
                raise HTTPError(503, error.code, what, param="model") from error
            return
        for source in self._sources:
            try:
                async with self._turns:
                    await asyncio.to_thread(self._control.load, name, name, sources=[source])
            except (UnknownAdapter, RepoNotFound):
                continue
            except AdapterpackError as error:
                _LOG.error("the adapter %s was refused: %s", name, error)
                break
            self._fetched[name] = None
            if len(self._fetched) > MOST:
                with suppress(UnknownAdapter):
                    await asyncio.to_thread(self._control.unload, self._fetched.popitem(last=False)[0])
            return
        self._absent[name] = time.monotonic() + _ABSENT_SECONDS
        if len(self._absent) > MOST:
            self._absent.popitem(last=False)
