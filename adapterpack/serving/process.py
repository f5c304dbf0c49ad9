"""The loop of a server, from its first request to its last: signals, the drain, and the watchdog of the engine's steps."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..http.protocol import Protocol
from ..runtime.engine.engine import DecoderEngine
from .app import build
from .audit import Audit
from .catalogue import Catalogue
from .keys import Keys
from .limits import Limits
from .metrics import Metrics
from .openai.token_texts import TokenTexts
from .scheduling.engine_thread import EngineThread
from .scheduling.gate import Gate
from .scheduling.prepare import Preparer
from .state import State

_LAST_SECONDS = 5
"""That answers have to be sent once their rows have ended."""
_LOG = logging.getLogger("adapterpack.serving")


def run(listening: socket.socket, engine: DecoderEngine, catalogue: Catalogue, keys: Keys, audit: Audit, limits: Limits, sampling: str,
        hosts: frozenset[str] | None, ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or Ctrl-C, and then until the answers that were begun have ended.

    Raises:
        KeyboardInterrupt: it was Ctrl-C.
    """
    interrupted = asyncio.run(_run(listening, engine, catalogue, keys, audit, limits, sampling, hosts, ready))
    if interrupted:
        raise KeyboardInterrupt


async def _run(listening: socket.socket, engine: DecoderEngine, catalogue: Catalogue, keys: Keys, audit: Audit, limits: Limits,
               sampling: str, hosts: frozenset[str] | None, ready: Callable[[], None]) -> bool:
    metrics = Metrics()
    preparer = Preparer(engine, limits, sampling)
    thread = EngineThread(engine, asyncio.get_running_loop(), metrics.stepped)
    state = State(thread, catalogue, preparer, TokenTexts(engine.bundle.tokenizer), Gate(limits, engine.max_rows), keys, limits, metrics,
                  audit, hosts)
    _gauges(metrics, thread)
    config = uvicorn.Config(build(state), http=Protocol, ws="none", lifespan="off", log_level="warning", access_log=False,
                            server_header=False, h11_max_incomplete_event_size=limits.header_bytes + 4096,
                            timeout_graceful_shutdown=_LAST_SECONDS)
    server = Server(config, state, ready)
    watchdog = asyncio.create_task(_watch(state))
    thread.start()
    try:
        await server.serve(sockets=[listening])
    finally:
        watchdog.cancel()
        thread.close()
        preparer.close()
    return server.interrupted


def _gauges(metrics: Metrics, thread: EngineThread) -> None:
    engine = thread.engine
    for name, what, value in (
        ("waiting_rows", "Rows that wait for the engine.", lambda: thread.waiting),
        ("running_rows", "Rows that the engine runs.", lambda: thread.running),
        ("resident_adapters", "Adapters in memory.", lambda: len(engine.adapters.digests)),
        ("resident_bytes", "The size of all adapters in memory.", lambda: engine.adapters.nbytes),
        ("prompt_tokens_read", "Tokens of prompts that the engine has read.", lambda: engine.rows.prefilled),
        ("prompt_tokens_reused", "Tokens of prompts that were known from rows before.", lambda: engine.rows.reused),
    ):
        metrics.gauge(name, what, value)


async def _watch(state: State) -> None:
    """Writes down when a step of the engine is stuck, once for each."""
    stuck_since = 0.0
    while True:
        await asyncio.sleep(min(1.0, state.limits.stuck_seconds / 4))
        activity, stuck = state.engine.activity, state.engine.stuck(state.limits.stuck_seconds)
        if activity is not None and stuck is not None and activity.since != stuck_since:
            stuck_since = activity.since
            _LOG.critical("the engine is stuck: %s", stuck)


class Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn's server, which on the first signal lets nobody in any more and ends after the last answer; on the second at once."""

    def __init__(self, config: uvicorn.Config, state: State, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._state, self._ready, self._loop = state, ready, asyncio.get_running_loop()
        self._drain: asyncio.Task[None] | None = None
        self.interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to take requests."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to end."""
        self.interrupted |= sig == signal.SIGINT
        if self._state.gate.draining:
            self.should_exit = self.force_exit = True
            return
        self._state.gate.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = asyncio.create_task(self._drained())

    async def _drained(self) -> None:
        """Waits for the answers that were begun; those that take too long are broken off."""
        until = time.monotonic() + self._state.limits.drain_seconds
        while self._state.gate.rows and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._state.engine.close)
        self.should_exit = True
