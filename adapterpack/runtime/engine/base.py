"""What every engine is: requests come and go one by one, each with its own adapter, and steps work on them
together.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from ...bundle.manifest import read_bundle
from ...errors import ConfigError, Unsupported
from ...registry import Registry
from ...tasks.task import Task, get_task
from ..open_bundle import OpenBundle
from ..providers.device import Device
from .adapter_feeds import ResidentAdapter
from .adapter_table import AdapterTable, Named
from .requests import Event


class EngineRow(Protocol):
    """A row of any kind of engine."""

    number: int

    @property
    def adapter(self) -> ResidentAdapter | None:
        """The adapter that it runs with."""


class Engine:
    """Runs a bundle for requests that come one by one. ``Engine(bundle, ...)`` is an engine of the kind that
    runs the bundle's task:
    :class:`~.engine.DecoderEngine` for one that makes text, :class:`~.encoder_engine.EncoderEngine` for one
    that takes one pass a row. Options are that kind's.

    One thread calls :meth:`step`; any thread may add and cancel requests, load and unload adapters.

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
    """How many rows run at once, at most."""
    max_length: int | None
    """How many tokens a row may have, an answer included; None where nothing bounds them."""
    rows_a_turn: int
    """How many rows take the engine as long as one answer does: one of a decoder, or all rows of one pass."""
    ahead: int
    """How many rows besides are worth having ready, for who has an order of requests of its own."""
    adapters: AdapterTable
    """The adapters that requests may name; they are loaded and unloaded here while rows run."""

    def __new__(
        cls, bundle: str | os.PathLike[str] | OpenBundle, provider: str | Device | None = None, **options: Any
    ) -> Engine:
        """An engine, of the kind that runs the bundle's task where none is named."""
        engine = object.__new__(_kind_for(bundle) if cls is Engine else cls)
        engine._numbers, engine._messages, engine._stepping = count(1), deque(), threading.Lock()
        return engine

    _numbers: count[int]
    _messages: deque[tuple[str, Any]]
    """What other threads left for the next step: rows to add, and numbers of requests to cancel."""
    _stepping: threading.Lock

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        raise NotImplementedError

    def add(self, prompt: Any, adapter: Named = None, **options: Any) -> int:
        """Adds a request, and returns its number; any thread may. What is wrong with it is said here, before
        its row begins.

        The adapter is read here, and the row keeps it, whatever is loaded and unloaded meanwhile.
        """
        raise NotImplementedError

    def submit(self, row: EngineRow) -> None:
        """Adds a row that the engine's ``row`` made: :meth:`add` in two steps, for those who have their own
        order of requests.
        """
        self._messages.append(("add", row))

    def discard(self, row: EngineRow) -> None:
        """Gives up a row that the engine's ``row`` made and that was not submitted."""
        if row.adapter is not None:
            self.adapters.release(row.adapter)

    def cancel(self, request: int) -> None:
        """Ends a request at the next step, wherever it is; one that has ended stays as it is. Any thread
        may.
        """
        self._messages.append(("cancel", request))

    def forget(self) -> None:
        """Gives up what rows that have ended left for later ones that begin as they do. Where no row runs,
        what follows is then as it is on an engine that was just made.
        """

    def step(self) -> list[Event]:
        """Takes messages in and does one step's work; what happened to requests. An error of one row ends
        that row alone, with an event of the reason ``error``.

        Raises:
            ConfigError: another thread is in a step.
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

    def _step(self) -> list[Event]:
        """One step's work."""
        raise NotImplementedError


@dataclass(frozen=True)
class EngineKind:
    """One kind of engine: its ``engine`` takes the bundles of the tasks that it ``runs``."""

    name: str
    runs: Callable[[Task], bool]
    engine: type[Engine]


ENGINES: Registry[EngineKind] = Registry(
    "engine", EngineKind, "adapterpack.engines", "adapterpack.runtime.engine"
)
"""Name -> the kind. A module of this folder registers the one that it defines."""


def _kind_for(bundle: str | os.PathLike[str] | OpenBundle) -> type[Engine]:
    task = bundle.task if isinstance(bundle, OpenBundle) else get_task(read_bundle(bundle).task)
    kind = next((kind for kind in ENGINES.values() if kind.runs(task)), None)
    if kind is None:
        raise Unsupported("no engine runs this task", found=task.name, remedy="use adapterpack.Session")
    return kind.engine
