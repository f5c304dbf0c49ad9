"""Servers inside of another process, without an address of their own: as an ASGI application, for processes
that have their own address or event loop, and for requests in blocks and in a fixed order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ..engine_graph.genai_engine import served_folder
from ..pack import Pack
from ..paths import StrPath
from ..runtime import Device, Engine
from .assembly import assemble
from .route import RouteSpec
from .scheduling import EngineThread, ScheduledRow
from .tenants import Keys, ServerLimits

_WITHOUT_END = 10**9
_LIMITS = ServerLimits(
    body_bytes=64 << 20,
    open_rows=_WITHOUT_END,
    open_rows_a_key=_WITHOUT_END,
    request_seconds=_WITHOUT_END,
    masks_beside=False,
)
"""A job has the engine to itself: its rows and time are unlimited, and slow masks delay nobody else.
"""


class Application:
    """The routes of a bundle, answered in the event loop ``loop``, by default the running one; :meth:`close`
    stops it.

    ``keys`` is a file of keys; without one, everyone who can reach the application may use it. ``engine`` is
    the class of the thread that runs the engine. Other options are those of :func:`adapterpack.serve`.
    ``routes`` maps the paths of routes with a body to them.

    Raises:
        AdapterpackError: see :func:`adapterpack.serve`.

    Example:
        >>> application = Application("bundle", adapters=["packs/orders"])  # doctest: +SKIP
    """

    def __init__(
        self,
        bundle: StrPath,
        provider: str | Device | None = None,
        *,
        adapters: Sequence[Pack | StrPath] = (),
        name: str | None = None,
        keys: StrPath | None = None,
        audit: str | None = None,
        sampling: str | None = None,
        threads: int | None = None,
        limits: ServerLimits | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        engine: type[EngineThread] = EngineThread,
        **size: Any,
    ) -> None:
        bounds = limits or ServerLimits()
        server = assemble(
            Engine(served_folder(bundle), provider, threads=threads, **size),
            adapters,
            Keys(path=None if keys is None else Path(keys), unread_seconds=bounds.unread_keys_seconds),
            bounds,
            {"sampling": sampling},
            name=name,
            audit=audit,
            thread=engine,
        )
        self._server = server
        self.state = server.state
        self.thread = server.state.engine
        self.provider = self.thread.engine.bundle.provider
        self.routes: Mapping[str, RouteSpec] = {
            route.path: route for api in server.apis for route in api.routes if route.body is not None
        }
        self.thread.start(loop or asyncio.get_running_loop())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one ASGI request."""
        await self._server.app(scope, receive, send)

    def close(self) -> None:
        """Stops the engine after its current step and closes the APIs."""
        self.thread.close()
        self._server.close()


def scope_of(path: str, headers: Mapping[str, str]) -> Mapping[str, Any]:
    """Makes the ASGI scope of a POST without a connection."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "client": None,
        "server": None,
        "headers": [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()
        ],
    }


class Posted(NamedTuple):
    """A request: its path, its body, and the id for its response."""

    path: str
    body: bytes
    id: str


class Reply(NamedTuple):
    """The response to a request."""

    status: int
    body: bytes


class InProcess:
    """A server without an address. ``routes`` maps the paths of routes with a body to them.

    The requests of a block start together, in their order, and a block starts after the one before has ended.
    Results therefore do not depend on timing.

    Raises:
        AdapterpackError: see :func:`adapterpack.serve`.
    """

    def __init__(
        self,
        bundle: StrPath,
        provider: str | Device | None,
        max_rows: int,
        sampling: str | None,
        adapters: Sequence[Pack] = (),
    ) -> None:
        with ExitStack() as stack:
            self._loop = stack.enter_context(asyncio.Runner()).get_loop()
            self._app = Application(
                bundle,
                provider,
                adapters=adapters,
                sampling=sampling,
                limits=_LIMITS,
                loop=self._loop,
                max_rows=max_rows,
                engine=_Thread,
            )
            stack.callback(self._app.close)
            self._stack = stack.pop_all()
        self.provider, self.routes = self._app.provider, self._app.routes

    @property
    def _thread(self) -> _Thread:
        assert isinstance(self._app.thread, _Thread)
        return self._app.thread

    def close(self) -> None:
        """Stops the server."""
        self._stack.close()

    def block(self, requests: Sequence[Posted]) -> Sequence[Callable[[], Reply]]:
        """Starts requests, and returns for each a function that waits for its response."""
        tasks = self._loop.run_until_complete(self._begin(requests))
        return [lambda task=task: self._loop.run_until_complete(task) for task in tasks]  # type: ignore[misc]

    async def _begin(self, requests: Sequence[Posted]) -> list[asyncio.Task[Reply]]:
        tasks = []
        with self._thread.hold():
            for request in requests:  # one at a time, so that the engine gets the rows in this order
                self._thread.added.clear()
                tasks.append(asyncio.create_task(self._answer(request)))
                added = asyncio.create_task(self._thread.added.wait())
                await asyncio.wait({tasks[-1], added}, return_when=asyncio.FIRST_COMPLETED)
                added.cancel()
        return tasks

    async def _answer(self, request: Posted) -> Reply:
        """Handles one request through ASGI, as an HTTP server would."""
        received = [{"type": "http.request", "body": request.body, "more_body": False}]
        status = 0
        body = bytearray()

        async def receive() -> Any:
            if received:
                return received.pop()
            return await asyncio.Event().wait()  # the client never disconnects

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            body.extend(message.get("body", b""))

        headers = {
            "host": "localhost",
            "content-type": "application/json",
            "content-length": str(len(request.body)),
            "x-request-id": request.id,
        }
        await self._app(scope_of(request.path, headers), receive, send)
        return Reply(status, bytes(body))


class _Thread(EngineThread):
    """An engine thread that makes rows ready in the thread that adds them, and signals that it has them."""

    at_once = True

    def __init__(self, engine: Engine, stepped: Callable[[float, int], None]) -> None:
        super().__init__(engine, stepped)
        self.added = asyncio.Event()

    def add(self, rows: Sequence[ScheduledRow]) -> None:
        """Adds rows and sets the ``added`` event."""
        super().add(rows)
        self.added.set()
