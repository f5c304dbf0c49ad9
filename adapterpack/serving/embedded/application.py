"""A server as an ASGI application, for processes that have their own address or event loop, or none
at all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...pack.pack import Pack
from ...pack.trust.sign import Signers
from ...runtime.engine.base import Engine
from ...runtime.providers.device import Device
from ..adapters.adapter_control import AdapterControl
from ..adapters.adapter_source import AdapterSources
from ..adapters.startup import StartupAdapters
from ..api import apis_of
from ..catalogue import Catalogue
from ..observability.audit import AuditLog
from ..observability.metrics import Metrics
from ..process import Setup, build_server
from ..route import RouteSpec
from ..scheduling.engine_thread import EngineThread
from ..tenants.keys import Keys
from ..tenants.limits import ServerLimits


class Application:
    """The routes of a bundle, answered in the event loop ``loop``, by default the running one; :meth:`close`
    stops it.

    ``keys`` is a file of keys; without one, everyone who can reach the application may use it. ``engine``
    makes the thread that runs the engine. Other options are those of :func:`adapterpack.serve`. ``routes``
    maps the paths of routes with a body to them.

    Raises:
        AdapterpackError: see :func:`adapterpack.serve`.

    Example:
        >>> application = Application("bundle", adapters=["packs/orders"])  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        provider: str | Device | None = None,
        *,
        adapters: Sequence[Pack | str | os.PathLike[str]] = (),
        name: str | None = None,
        keys: str | os.PathLike[str] | None = None,
        audit: str | None = None,
        sampling: str | None = None,
        threads: int | None = None,
        limits: ServerLimits | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        engine: Callable[..., EngineThread] = EngineThread,
        **size: Any,
    ) -> None:
        running = Engine(bundle, provider, threads=threads, **size)
        catalogue, metrics, given, bounds = (
            Catalogue(running, name),
            Metrics(),
            StartupAdapters.of(adapters),
            limits or ServerLimits(),
        )
        control = AdapterControl(
            running.adapters,
            catalogue.base,
            AdapterSources(given.sources),
            Signers([]),
            metrics.adapter_changed,
        )
        given.load(control, changing=False, watched=False)
        apis = apis_of(running, bounds, {} if sampling is None else {"sampling": sampling})
        self._stack = ExitStack()
        for api in apis:
            self._stack.callback(api.close)
        known = Keys(path=None if keys is None else Path(keys), unread_seconds=bounds.unread_keys_seconds)
        setup = Setup(
            engine=running,
            apis=apis,
            catalogue=catalogue,
            adapters=control,
            keys=known,
            limits=bounds,
            metrics=metrics,
            ended=[metrics.record, AuditLog(audit).write],
            hosts=None,
            tls=None,
            watch=None,
            watch_seconds=0.0,
        )
        self.provider: str = running.bundle.provider
        self.routes: Mapping[str, RouteSpec] = {
            route.path: route for api in apis for route in api.routes if route.body is not None
        }
        self.thread = engine(running, loop or asyncio.get_running_loop(), metrics.record_step)
        self.state, self._app = build_server(setup, self.thread)
        self.thread.start()
        self._stack.callback(self.thread.close)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one ASGI request."""
        await self._app(scope, receive, send)

    def close(self) -> None:
        """Stops the engine after its current step and closes the APIs."""
        self._stack.close()


def scope_of(
    method: str, path: str, headers: Sequence[tuple[str, str]], query: str = ""
) -> Mapping[str, Any]:
    """Makes the ASGI scope of a request without a connection."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "client": None,
        "server": None,
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
    }
