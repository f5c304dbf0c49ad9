"""The thread that runs the engine's steps. Other threads send it messages, and it posts output to the event
loop that serves the requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple

from ...errors import AdapterpackError
from ...runtime import Engine
from ...runtime.engine import EngineRow, Event
from .fair_queue import FairQueue
from .rows import ScheduledRow

_LAST_SECONDS = 1.0
"""Seconds that a last step still gets when the thread must end."""
_LOG = logging.getLogger("adapterpack.serving")


class Activity(NamedTuple):
    """What the thread is doing, and since when."""

    what: str
    since: float


class EngineStopped(AdapterpackError):
    """The engine's thread has ended: no row runs any more."""

    code = "engine-stopped"


class EngineThread:
    """Runs rows on an engine in the order of a :class:`.FairQueue`, and writes output into their
    :class:`.RequestOutput`.

    Rows pass three stages: the queue; ``admitted``, while a loader thread reads the adapter; and the engine.
    ``stepped`` is called in the thread with the duration and the number of tokens of each step.
    """

    at_once = False
    """Whether adapters are read in the thread that adds rows."""

    def __init__(self, engine: Engine, stepped: Callable[[float, int], None]) -> None:
        self.engine, self._stepped = engine, stepped
        self._order = threading.Lock()
        """Guards the queue and ``_admitted``."""
        self._queue = FairQueue()
        self._messages: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._admitted: set[ScheduledRow] = set()
        """Rows that have left the queue and have not ended."""
        self._running: dict[int, ScheduledRow] = {}
        self._loader = ThreadPoolExecutor(2, thread_name_prefix="adapterpack-rows")
        self._thread = threading.Thread(target=self._run, name="adapterpack-engine", daemon=True)
        self._closing = False
        self.given_up = False
        """Whether the shutdown no longer waits for the current step."""
        self.activity: Activity | None = None
        self.failure: BaseException | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread, which writes its output in this event loop."""
        self._loop = loop
        self._thread.start()

    def close(self, seconds: float = math.inf) -> None:
        """Ends the thread after its current step, for which it waits at most ``seconds``. Remaining rows end
        with an error.
        """
        self._closing = True
        self._messages.put(lambda: None)
        until = time.monotonic() + seconds
        while self._thread.is_alive() and not self.given_up and time.monotonic() < until:
            self._thread.join(0.05)
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive() and self.failure is None:
            self.given_up, self.failure = True, RuntimeError("stuck")
            step = "no step" if self.activity is None else self.activity.what
            _LOG.critical("the engine is given up in %s", step)
            self._fail_all()
        self._loader.shutdown(wait=not self.given_up, cancel_futures=True)

    def add(self, rows: Sequence[ScheduledRow]) -> None:
        """Adds the rows of a request; any thread may call it. Rows that can begin soon are made ready at
        once, while the engine is in a step.
        """
        with self._order:
            for row in rows:
                self._queue.put(row)
        self._admit()
        if self.failure is not None:  # the thread may have ended before it saw the rows
            self._fail(rows)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Pauses the thread while the block lasts: rows that are added in it begin together, without cached
        state of earlier rows.
        """
        go = threading.Event()
        self._messages.put(self.engine.forget)
        self._messages.put(partial(self._pause, go))
        try:
            yield
        finally:
            go.set()

    def cancel(self, rows: Sequence[ScheduledRow]) -> None:
        """Ends rows in any stage; has no effect on rows that have ended. Any thread may call it."""
        self._messages.put(partial(self._cancel, rows))

    @property
    def waiting(self) -> int:
        """The number of rows in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """The number of rows in the engine."""
        return len(self._running)

    def stuck(self, seconds: float) -> str | None:
        """Returns a description of the current step if it has lasted longer than ``seconds``."""
        activity = self.activity
        if activity is None or time.monotonic() - activity.since < seconds:
            return None
        return f"{activity.what} since {time.monotonic() - activity.since:.0f} s"

    def _run(self) -> None:
        try:
            while not self._closing:
                self._take_messages(wait=not self.engine.busy)
                self._admit()
                if self.engine.busy:
                    self._step()
        except BaseException as error:
            self.failure = error
            _LOG.critical("the engine's thread has ended: %r", error, exc_info=error)
        finally:
            self.failure = self.failure or RuntimeError("closed")
            self.activity = None
            self._take_messages(wait=False)
            self._fail_all()

    def _take_messages(self, wait: bool) -> None:
        with suppress(Empty):
            while True:
                self._messages.get(wait)()
                wait = False

    def _pause(self, go: threading.Event) -> None:
        """Waits until ``go`` is set or the thread must end, since the caller may have been interrupted before
        setting it.
        """
        while not self._closing and not go.wait(0.05):
            pass

    def _cancel(self, rows: Sequence[ScheduledRow]) -> None:
        for row in rows:
            if row.ended:
                continue
            row.ended = True
            with self._order:
                waited = self._queue.remove(row)
            if waited:
                self._tell([(row, Event(0, None, finish_reason="cancelled"))])
            elif row.request is not None:
                self.engine.cancel(row.request.number)

    def _admit(self) -> None:
        """Makes as many rows ready as can begin soon, on loader threads, because reading an adapter takes
        time. Rows with one pack begin together, so that a request with many rows runs in full batches.
        """
        by_pack: dict[str | None, list[ScheduledRow]] = {}
        with self._order:
            while (
                len(self._admitted) < self.engine.max_rows + self.engine.ahead
                and (row := self._queue.pop()) is not None
            ):
                self._admitted.add(row)
                by_pack.setdefault(None if row.pack is None else row.pack.id, []).append(row)
        for rows in by_pack.values():
            if self.at_once:
                self._make(rows)
                continue
            with suppress(RuntimeError):  # the loader is closed, and close() has ended the rows
                self._loader.submit(self._make, rows)

    def _make(self, rows: Sequence[ScheduledRow]) -> None:
        messages: list[Callable[[], None]] = []
        for row in rows:
            try:
                messages.append(partial(self._begin, row, row.make()))
            except AdapterpackError as error:
                messages.append(partial(self._leave, row, error))
            except BaseException as error:
                _LOG.exception("a row could not be made ready")
                messages.append(
                    partial(self._leave, row, AdapterpackError(f"{type(error).__name__}: {error}"))
                )
        # One message for all rows, so that the engine starts them in the same step.
        self._messages.put(partial(_all, messages))

    def _begin(self, row: ScheduledRow, request: EngineRow) -> None:
        if row.ended:
            self.engine.discard(request)
            self._leave(row, None)
            return
        row.request = request
        self._running[request.number] = row
        self.engine.submit(request)

    def _leave(self, row: ScheduledRow, error: AdapterpackError | None) -> None:
        """Ends a row that never began."""
        self._end(row)
        self._tell(
            [(row, Event(0, None, finish_reason="cancelled" if error is None else "error", error=error))]
        )

    def _end(self, row: ScheduledRow) -> None:
        row.ended = True
        with self._order:
            self._admitted.discard(row)
            self._queue.end(row)

    def _step(self) -> None:
        start = time.monotonic()
        adapters = sorted({row.pack.name for row in self._running.values() if row.pack is not None})
        self.activity = Activity(
            f"a step of {len(self._running)} rows with the adapters {', '.join(adapters) or 'none'}", start
        )
        events = self.engine.step()
        self.activity = None
        answered = []
        with self._order:
            for event in events:
                if tokens := sum(len(beam.ids) for beam in event.sequences) or event.choice is not None:
                    self._queue.charge(self._running[event.request], tokens)
        for event in events:
            row = self._running[event.request]
            if event.finish_reason is not None:
                del self._running[event.request]
                self._end(row)
            answered.append((row, event))
        self._stepped(time.monotonic() - start, sum(event.choice is not None for event in events))
        self._tell(answered)

    def _tell(self, answered: Sequence[tuple[ScheduledRow, Event]]) -> None:
        with suppress(RuntimeError):  # the loop is closed, so nothing waits for the output
            self._loop.call_soon_threadsafe(_take, answered, time.monotonic())

    def _fail_all(self) -> None:
        """Ends all rows that wait or run with an error."""
        with self._order:
            left = [*self._admitted]
            while (row := self._queue.pop()) is not None:
                left.append(row)
        self._fail(left)

    def _fail(self, rows: Sequence[ScheduledRow]) -> None:
        error = EngineStopped("the engine has stopped", remedy="start the server again; its log says why")
        self._tell([(row, Event(0, None, finish_reason="error", error=error)) for row in rows])


def _take(answered: Sequence[tuple[ScheduledRow, Event]], at: float) -> None:
    for row, event in answered:
        row.output.take(row.place, event, at)


def _all(messages: Sequence[Callable[[], None]]) -> None:
    for message in messages:
        message()
