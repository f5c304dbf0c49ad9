"""Runs the event loop of a server: signals, graceful shutdown, and the watchdog of the engine's steps."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from types import FrameType
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette

from ..http.bodies import DrainBodyOnError
from ..http.protocol import Protocol
from ..runtime.engine.base import Engine
from .adapters.adapter_control import AdapterControl
from .adapters.folder_watcher import FolderWatcher
from .admin import ADMIN_ROUTES
from .api import Api
from .app import build
from .catalogue import Catalogue
from .observability.audit import Record
from .observability.metrics import Figure, Metrics
from .observability.traffic import Traffic
from .route import RouteSpec
from .routes import table
from .scheduling.admission import Admission
from .scheduling.engine_thread import EngineThread
from .state import State
from .status import StatusRoutes
from .tenants.keys import Keys
from .tenants.limits import ServerLimits
from .tenants.quotas import Quotas

_LAST_SECONDS = 5
"""Seconds for sending answers whose rows have ended, at shutdown."""
_IDLE_SECONDS = 15
"""Seconds for which an idle connection is kept. Clients on httpx, such as OpenAI's, keep one for 5 s; with an
equal timeout some of their requests would hit a closing connection.
"""
_LOG = logging.getLogger("adapterpack.serving")


class OperatorAddress(NamedTuple):
    """The operator's socket, its key, and its TLS context if it uses TLS."""

    listening: socket.socket
    keys: Keys
    tls: ssl.SSLContext | None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of a server before its loop starts. ``tls`` is None for plain HTTP; ``watch`` checks the
    places of adapters every ``watch_seconds``; ``pages`` are the routes of the web page.
    """

    engine: Engine
    apis: Sequence[Api]
    catalogue: Catalogue
    adapters: AdapterControl
    keys: Keys
    ended: Sequence[Callable[[Record], None]]
    limits: ServerLimits
    metrics: Metrics
    hosts: frozenset[str] | None
    tls: ssl.SSLContext | None
    watch: FolderWatcher | None
    watch_seconds: float
    pages: Sequence[RouteSpec] = ()


def run(
    setup: Setup, listening: socket.socket, operator: OperatorAddress | None, ready: Callable[[], None]
) -> None:
    """Serves until SIGTERM or Ctrl-C, and then finishes the answers that have begun.

    Raises:
        KeyboardInterrupt: Ctrl-C ended the server.
    """
    interrupted = asyncio.run(_run(setup, listening, operator, ready))
    if interrupted:
        raise KeyboardInterrupt


async def _run(
    setup: Setup, listening: socket.socket, operator: OperatorAddress | None, ready: Callable[[], None]
) -> bool:
    thread = EngineThread(setup.engine, asyncio.get_running_loop(), setup.metrics.record_step)
    state, app = build_server(setup, thread)
    server = Server(config_of(app, setup.limits, setup.tls), state, ready)
    tasks = [asyncio.create_task(_watch(state))]
    if setup.watch is not None:
        tasks.append(asyncio.create_task(_look(setup.watch, setup.watch_seconds)))
    thread.start()
    try:
        async with _serve_operator(state, operator):
            await server.serve(sockets=[listening])
    finally:
        for task in tasks:
            task.cancel()
        thread.close(_LAST_SECONDS)
    return server.interrupted


def build_server(setup: Setup, thread: EngineThread) -> tuple[State, Starlette]:
    """Builds the state that a server's routes share, and its application."""
    quotas, limits = Quotas(), setup.limits
    setup.metrics.add_quotas(quotas)
    unread = "For how long the file of keys could not be read."
    setup.metrics.add(Figure("keys_unread_seconds", unread, lambda: setup.keys.unread_seconds))
    state = State(
        thread,
        setup.catalogue,
        setup.adapters,
        Admission.of(setup.engine, limits),
        setup.keys,
        quotas,
        limits,
        setup.metrics,
        setup.ended,
        Traffic(),
        setup.hosts,
    )
    _gauges(setup.metrics, thread, [figure for api in setup.apis for figure in api.figures])
    routes = table(chain(StatusRoutes().table(), *(api.routes for api in setup.apis)))
    return state, build(state, (*routes, *setup.pages))


@asynccontextmanager
async def _serve_operator(state: State, operator: OperatorAddress | None) -> AsyncIterator[None]:
    """Serves the operator's routes at their own address while the block lasts."""
    if operator is None:
        yield
        return
    app = build(replace(state, hosts=None), ADMIN_ROUTES, operator.keys)
    server = SecondServer(config_of(app, state.limits, operator.tls))
    task = asyncio.create_task(server.serve(sockets=[operator.listening]))
    try:
        yield
    finally:
        server.should_exit = True
        if state.engine.given_up:
            server.break_off()
        await task


def config_of(app: Any, limits: ServerLimits, tls: ssl.SSLContext | None = None) -> uvicorn.Config:
    """Returns uvicorn's configuration for an application: with deadlines and limits, without an
    access log.
    """
    config = uvicorn.Config(
        DrainBodyOnError(app),
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
    config.ssl = tls
    return config


async def _look(watch: FolderWatcher, seconds: float) -> None:
    """Checks the places of adapters periodically, on another thread, since that reads packs."""
    while True:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(watch.look)


def _gauges(metrics: Metrics, thread: EngineThread, more: Sequence[Figure]) -> None:
    engine = thread.engine
    for figure in (
        Figure("waiting_rows", "Rows that wait for the engine.", lambda: thread.waiting),
        Figure("running_rows", "Rows that the engine runs.", lambda: thread.running),
        Figure("malformed_requests", "Bytes that were no HTTP.", lambda: Protocol.malformed),
        Figure("resident_adapters", "Adapters in memory.", lambda: len(engine.adapters.digests)),
        Figure("resident_bytes", "The size of all adapters in memory.", lambda: engine.adapters.nbytes),
        *more,
    ):
        metrics.add(figure)


async def _watch(state: State) -> None:
    """Logs each engine step that is stuck, once, and reloads the file of keys."""
    stuck_since = 0.0
    while True:
        await asyncio.sleep(min(1.0, state.limits.stuck_seconds / 4))
        await state.keys.look()
        activity, stuck = state.engine.activity, state.engine.stuck(state.limits.stuck_seconds)
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
        self._state, self._ready, self._loop = state, ready, asyncio.get_running_loop()
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
