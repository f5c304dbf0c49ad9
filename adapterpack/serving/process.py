"""Runs the event loop of a server: signals, graceful shutdown, and the watchdog of the engine's steps."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import NamedTuple

import uvicorn
from starlette.applications import Starlette

from ..http import DrainBodyOnError, Protocol
from .adapters.folder_watcher import FolderWatcher
from .route import State
from .tenants import ServerLimits

_LAST_SECONDS = 5
"""Seconds for sending answers whose rows have ended, at shutdown."""
_IDLE_SECONDS = 15
"""Seconds for which an idle connection is kept. Clients on httpx, such as OpenAI's, keep one for 5 s; with an
equal timeout some of their requests would hit a closing connection.
"""
_LOG = logging.getLogger("adapterpack.serving")


class Address(NamedTuple):
    """A socket, the application that answers at it, and its TLS context; None for plain HTTP."""

    listening: socket.socket
    app: Starlette
    tls: ssl.SSLContext | None


def run(
    state: State,
    address: Address,
    operator: Address | None,
    ready: Callable[[], None],
    watcher: FolderWatcher | None,
    watch_seconds: float,
) -> None:
    """Serves until SIGTERM or Ctrl-C, and then finishes the answers that have begun. The ``watcher`` checks
    the places of adapters every ``watch_seconds``.

    Raises:
        KeyboardInterrupt: Ctrl-C ended the server.
    """

    async def serve() -> bool:
        server = Server(_config_of(address, state.limits), state, ready)
        tasks = [asyncio.create_task(_watch(state))]
        if watcher is not None:
            tasks.append(asyncio.create_task(_look(watcher, watch_seconds)))
        state.engine.start(asyncio.get_running_loop())
        try:
            async with _serve_operator(state, operator):
                await server.serve(sockets=[address.listening])
        finally:
            for task in tasks:
                task.cancel()
            state.engine.close(_LAST_SECONDS)
        return server.interrupted

    if asyncio.run(serve()):
        raise KeyboardInterrupt


@asynccontextmanager
async def _serve_operator(state: State, operator: Address | None) -> AsyncIterator[None]:
    """Serves the operator's routes at their own address while the block lasts."""
    if operator is None:
        yield
        return
    server = SecondServer(_config_of(operator, state.limits))
    task = asyncio.create_task(server.serve(sockets=[operator.listening]))
    try:
        yield
    finally:
        server.should_exit = True
        if state.engine.given_up:
            server.break_off()
        await task


def _config_of(address: Address, limits: ServerLimits) -> uvicorn.Config:
    """Returns uvicorn's configuration: with deadlines and limits, without an access log."""
    config = uvicorn.Config(
        DrainBodyOnError(address.app),
        http=Protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=limits.header_bytes + 4096,
        timeout_keep_alive=_IDLE_SECONDS,
    )
    config.load()
    config.ssl = address.tls
    return config


async def _look(watch: FolderWatcher, seconds: float) -> None:
    """Checks the places of adapters periodically, on another thread, since that reads packs."""
    while True:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(watch.look)


async def _watch(state: State) -> None:
    """Logs each engine step that is stuck, once, and reloads the file of keys."""
    stuck_since = 0.0
    while True:
        await asyncio.sleep(min(1.0, state.limits.stuck_seconds / 4))
        await state.keys.look()
        activity = state.engine.activity
        stuck = state.engine.stuck(state.limits.stuck_seconds)
        if activity is not None and stuck is not None and activity.since != stuck_since:
            stuck_since = activity.since
            _LOG.critical("the engine is stuck: %s", stuck)


class _Bounded(uvicorn.Server):  # type: ignore[misc]
    """A uvicorn server whose shutdown no client can delay."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops taking requests; clients get a few seconds to read the rest of their answers."""
        last = asyncio.get_running_loop().call_later(_LAST_SECONDS, self.break_off)
        await super().shutdown(sockets)
        last.cancel()
        self.break_off()

    def break_off(self) -> None:
        """Closes all connections and cancels their tasks. Each counts as disconnected by its client, since
        uvicorn would otherwise log an error for it.
        """
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.break_off()
        for task in list(self.server_state.tasks):
            task.cancel()


class SecondServer(_Bounded):
    """A server that leaves signals to the main one."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does nothing, since the main server handles signals."""
        yield


class Server(_Bounded):
    """A server that drains on the first signal: it takes no new requests and ends after the last answer. On
    the second signal it ends at once.
    """

    def __init__(self, config: uvicorn.Config, state: State, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._state = state
        self._ready = ready
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None
        self.interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to take requests."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal to stop."""
        self.interrupted |= sig == signal.SIGINT
        if self._state.admission.draining:
            self.should_exit = self.force_exit = self._state.engine.given_up = True
            self._loop.call_soon_threadsafe(self.break_off)
            return
        self._state.admission.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Waits for answers that have begun, up to the limit, and cancels the rest."""
        until = time.monotonic() + self._state.limits.drain_seconds
        while self._state.admission.rows and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._state.engine.close, _LAST_SECONDS)
        self.should_exit = True
