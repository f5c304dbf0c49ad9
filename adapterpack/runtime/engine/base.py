"""The interface of all engines: requests arrive one by one, each with its own adapter, and each step works on
several together.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from ...bundle import read_bundle
from ...errors import ConfigError, Unsupported
from ...paths import StrPath
from ...registry import Registry
from ...tasks import Task, get_task
from ..genai_bundle import bundle_folder
from ..open_bundle import OpenBundle
from ..providers import Device
from .adapter_feeds import ResidentAdapter
from .adapter_table import AdapterTable, Named
from .requests import Event


class EngineRow(Protocol):
    """A row of any kind of engine."""

    number: int

    @property
    def adapter(self) -> ResidentAdapter | None:
        """The adapter with which it runs, None for the base."""


class Engine:
    """Runs a bundle for requests that come one by one. ``Engine(bundle, ...)`` makes an engine of the kind
    that runs the bundle's task: :class:`~.engine.DecoderEngine` for tasks that generate text,
    :class:`~.encoder_engine.EncoderEngine` for tasks with one pass a row. The options are those of that
    class.

    One thread calls :meth:`step`; any thread may add and cancel requests, and load and unload adapters.

    Raises:
        Unsupported: no kind of engine runs the bundle.

    Example:
        >>> engine = Engine("bundle")  # doctest: +SKIP
        >>> request = engine.add("Order 12 mugs for Lisbon", adapter="orders",
        ...     max_new_tokens=40)  # doctest: +SKIP
        >>> while engine.busy:  # doctest: +SKIP
        ...     for event in engine.step():
        ...         print(event.request, event.text or event.result, event.finish_reason)
    """

    bundle: OpenBundle
    max_rows: int
    """The most rows that run at once."""
    max_length: int | None
    """The most tokens of a row, its answer included; None if nothing bounds them."""
    rows_a_turn: int
    """The number of rows that cost the engine as much as one answer: 1 for a decoder, a full batch for an
    encoder. Admission counts that many waiting rows as one.
    """
    ahead: int
    """How many more rows a caller with a queue of its own should submit ahead, so that the engine never
    idles.
    """
    adapters: AdapterTable
    """The adapters that requests may name. It loads and unloads them while rows run."""

    def __new__(
        cls, bundle: StrPath | OpenBundle, provider: str | Device | None = None, **options: Any
    ) -> Engine:
        """Makes an engine; ``Engine`` itself picks the kind that runs the bundle's task."""
        engine = object.__new__(_kind_for(bundle) if cls is Engine else cls)
        engine._numbers, engine._stepping = count(1), threading.Lock()
        engine._messages, engine._waiting = deque(), deque()
        return engine

    _numbers: count[int]
    _messages: deque[tuple[str, Any]]
    """Messages of other threads to the next step: rows to add, and numbers of requests to cancel."""
    _stepping: threading.Lock

    _waiting: deque[Any]
    """The rows that have not begun."""

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self._messages or self._waiting)

    def add(self, prompt: Any, adapter: Named = None, **options: Any) -> int:
        """Adds a request and returns its number; any thread may call it. Raises here, before the row begins,
        if the request is invalid.

        The adapter is read here, and the row keeps it, whatever is loaded or unloaded meanwhile.
        """
        raise NotImplementedError

    def submit(self, row: EngineRow) -> None:
        """Adds a row that the engine's ``row`` made. Together they do what :meth:`add` does, in two steps,
        for callers that order requests themselves.
        """
        self._messages.append(("add", row))

    def discard(self, row: EngineRow) -> None:
        """Releases the adapter of a row that has ended, or that will not be submitted."""
        if row.adapter is not None:
            self.adapters.release(row.adapter)

    def cancel(self, request: int) -> None:
        """Ends a request at the next step, whether it waits or runs; has no effect on a request that has
        ended. Any thread may call it.
        """
        self._messages.append(("cancel", request))

    def forget(self) -> None:
        """Drops what earlier rows left for later ones, such as cached prefixes. If no row runs, the engine
        then behaves like a new one.
        """

    def step(self) -> list[Event]:
        """Takes in messages, does one step of work, and returns the events of its requests. An error of one
        row ends that row alone, with an event whose ``finish_reason`` is ``error``.

        Raises:
            ConfigError: another thread is executing a step.
        """
        if not self._stepping.acquire(blocking=False):
            raise ConfigError(
                "one thread at a time may take steps",
                remedy="let one thread call step, and others add and cancel",
            )
        try:
            return self._step()
        finally:
            self._stepping.release()

    def _take_messages(self, events: list[Event]) -> None:
        """Takes in the rows and cancellations of other threads."""
        while self._messages:
            kind, what = self._messages.popleft()
            if kind == "add":
                self._waiting.append(what)
            else:
                self._cancel(what, events)

    def _step(self) -> list[Event]:
        """Does one step of work; :meth:`step` makes sure that one thread at a time calls it."""
        raise NotImplementedError

    def _cancel(self, number: int, events: list[Event]) -> None:
        """Ends the request of that number, if it has not ended."""
        raise NotImplementedError


@dataclass(frozen=True)
class EngineKind:
    """A kind of engine: its class ``engine`` takes the bundles whose tasks it ``runs``."""

    name: str
    runs: Callable[[Task], bool]
    engine: type[Engine]


ENGINES = Registry("engine", EngineKind, "adapterpack.engines", "adapterpack.runtime.engine")
"""Name -> kind of engine. Each module of this folder that defines one registers it."""


def _kind_for(bundle: StrPath | OpenBundle) -> type[Engine]:
    task = (
        bundle.task if isinstance(bundle, OpenBundle) else get_task(read_bundle(bundle_folder(bundle)).task)
    )
    kind = next((kind for kind in ENGINES.values() if kind.runs(task)), None)
    if kind is None:
        raise Unsupported("no engine runs this task", found=task.name, remedy="use adapterpack.Session")
    return kind.engine
