"""Threads: sites are shared out among a few, and the BLAS computes on the thread that calls it.

A product that the BLAS splits over its own threads rounds as they are many, and its threads fight those that call it: two by two on two
cores took twenty times as long as one each. With one thread a product the bytes of a result depend neither on the number of cores nor on
``OMP_NUM_THREADS``, as long as what is computed together depends on shapes alone and sums are added up in one order.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")

_lock = threading.Lock()
_held: list[Any] = []
"""Who holds the limit, and its users: the number of threads is the process's, so the last one to leave takes the limit off."""
_usual: list[float] = []
"""Of everyone who asked for quick turns, the interval that was there before the first: it too is the process's."""
_threadless = threading.Event()
"""Set where numpy's BLAS was loaded so that it has no threads."""
_inside = threading.local()


def workers() -> int:
    """Threads for work that numpy does outside of the interpreter's lock: one a core, 4 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)


@contextmanager
def no_blas_threads() -> Iterator[None]:
    """For a process that multiplies on threads of its own: if numpy is imported within the block, the BLAS starts none, which is quicker.

    Then there is nothing to limit any more. Processes that are started after the block see nothing of it.
    """
    name, there = "OPENBLAS_NUM_THREADS", "numpy" in sys.modules
    asked = name in os.environ
    os.environ.setdefault(name, "1")
    try:
        yield
        if not there and "numpy" in sys.modules and os.environ[name] == "1" and _is_openblas():
            _threadless.set()
    finally:
        if not asked:
            del os.environ[name]


def _is_openblas() -> bool:
    """Whether numpy was built with the library that looks at that variable."""
    built: Any = sys.modules["numpy"].show_config(mode="dicts")
    return "openblas" in str(built.get("Build Dependencies", {}).get("blas", {}).get("name", ""))


@contextmanager
def quick_turns() -> Iterator[None]:
    """Within the block a thread that comes back for the interpreter's lock, from a file or from numpy, waits 0.2 ms for it and not 5.

    For work of many short steps beside a thread that keeps the lock, such as one that imports. Blocks may be nested and may overlap.
    """
    with _lock:
        _usual.append(_usual[0] if _usual else sys.getswitchinterval())
        sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        with _lock:
            usual = _usual.pop()
            if not _usual:
                sys.setswitchinterval(usual)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within the block the BLAS of this process starts no threads of its own; blocks may be nested and may overlap."""
    with _lock:
        if not _held:
            _held.append((lambda: None) if _threadless.is_set() else _holder())
        _held.append(None)
    try:
        yield
    finally:
        with _lock:
            _held.pop()
            if len(_held) == 1:
                _held.pop()()


def _holder() -> Callable[[], None]:
    """A thread that holds the limit, and what ends it: threadpoolctl lets nobody lift a limit but the thread that set it, and ignores,
    without a word, what another thread asks for meanwhile."""
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        from threadpoolctl import threadpool_limits  # noqa: PLC0415 - most commands multiply nothing

        try:
            with threadpool_limits(1, "blas"):
                begun.set()
                done.wait()
        finally:
            begun.set()

    def end() -> None:
        done.set()
        thread.join()  # else the next one might ask before this one has let go

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    begun.wait()
    return end


def as_worker() -> None:
    """Says that this thread is one of several that share a work out, so that it shares out nothing itself."""
    _inside.worker = True


def in_order(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """``function`` of every item, by the threads, in the order of the items; no more is begun than what is soon taken.

    Work that is itself shared out inside of such a thread is done by that thread.

    Example:
        >>> list(in_order(lambda x: x * x, range(5)))
        [0, 1, 4, 9, 16]
    """
    if getattr(_inside, "worker", False) or workers() == 1:
        with one_thread_each():
            yield from map(function, items)
        return

    with one_thread_each(), ThreadPoolExecutor(workers(), initializer=as_worker) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(copy_context().run, function, item))
                if len(waiting) > 2 * workers():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
