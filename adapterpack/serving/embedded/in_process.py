"""Runs requests within this process, without connections: in blocks, and in a fixed order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from typing import Any, NamedTuple

from ...runtime.engine.base import Engine
from ...runtime.providers.device import Device
from ..scheduling.engine_thread import EngineThread
from ..scheduling.rows import ScheduledRow
from ..tenants.limits import ServerLimits
from .application import Application, scope_of

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
        bundle: str | os.PathLike[str],
        provider: str | Device | None,
        max_rows: int,
        sampling: str | None,
    ) -> None:
        with ExitStack() as stack:
            self._loop = stack.enter_context(asyncio.Runner()).get_loop()
            self._app = Application(
                bundle,
                provider,
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
        status, body = 0, bytearray()

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
        await self._app(scope_of("POST", request.path, [*headers.items()]), receive, send)
        return Reply(status, bytes(body))


class _Thread(EngineThread):
    """An engine thread that signals when rows are added."""

    def __init__(
        self, engine: Engine, loop: asyncio.AbstractEventLoop, stepped: Callable[[float, int], None]
    ) -> None:
        super().__init__(engine, loop, stepped, _AtOnce())
        self.added = asyncio.Event()

    def add(self, rows: Sequence[ScheduledRow]) -> None:
        """Adds rows and sets the ``added`` event."""
        super().add(rows)
        self.added.set()


class _AtOnce(Executor):
    """An executor that runs each function in the thread that submits it."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        """Runs the function immediately and returns a completed future."""
        done: Future[Any] = Future()
        done.set_result(function(*args, **options))
        return done
