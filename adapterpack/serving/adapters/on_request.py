"""Loads adapters when a request first names them, from the sources that the operator allows."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ...errors import UnknownAdapter
from ...http.http_error import HTTPError
from ...manifest.manifest import NAME
from ..tenants.keys import Key
from .adapter_control import AdapterControl
from .adapter_source import AdapterSource, HubOwner

AUTO = "auto"
"""The model that stands for the adapter that a request's text fits best."""
MOST = 1000
"""The most adapters that stay loaded because requests named them; the least recently named goes first."""
_AT_ONCE = 32
_ABSENT_SECONDS = 10.0
"""For how long a name that no source has is not looked for again."""


class OnRequest:
    """Loads adapters by name in the event loop's background. However many requests name one at once, it is
    loaded once. Without ``sources`` nothing is.
    """

    def __init__(self, control: AdapterControl, sources: Sequence[AdapterSource | HubOwner]) -> None:
        self._control, self._sources = control, sources
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="adapterpack-fetch")
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._fetched = OrderedDict[str, None]()
        self._absent = OrderedDict[str, float]()

    def close(self) -> None:
        """Stops the threads."""
        self._threads.shutdown(wait=False)

    async def ensure(self, name: str, key: Key) -> None:
        """Loads the adapter with a name if the key may use it, no model has the name yet, and a source has
        it.

        Raises:
            HTTPError: too many adapters are being loaded.
        """
        if self._control.has(name):
            if name in self._fetched:
                self._fetched.move_to_end(name)
            return
        absent = self._absent.get(name, 0.0) > time.monotonic()
        if not self._sources or absent or name == AUTO or not NAME.fullmatch(name) or not key.may(name):
            return
        if name not in self._loading:
            if len(self._loading) >= _AT_ONCE:
                raise HTTPError(429, "rate_limit_exceeded", "too many adapters are loading", retry_after=1)
            task = self._loading[name] = asyncio.create_task(self._load(name))
            task.add_done_callback(lambda _: self._loading.pop(name))
        await asyncio.shield(self._loading[name])

    async def _load(self, name: str) -> None:
        run = asyncio.get_running_loop().run_in_executor
        if await run(self._threads, self._control.fetch, name, self._sources):
            self._fetched[name] = None
            if len(self._fetched) > MOST:
                with suppress(UnknownAdapter):
                    await run(self._threads, self._control.unload, self._fetched.popitem(last=False)[0])
        else:
            self._absent[name] = time.monotonic() + _ABSENT_SECONDS
            while len(self._absent) > MOST:
                self._absent.popitem(last=False)
