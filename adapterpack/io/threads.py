"""Shares sites out among a few threads; each runs its BLAS calls on itself alone.

A product that the BLAS splits over its own threads rounds as they are many, and its threads fight those that
call it: two by two on two cores took twenty times as long as one each. With one thread a product the bytes of
a result depend neither on the number of cores nor on ``OMP_NUM_THREADS``, as long as what is computed
together depends on shapes alone and sums are added up in one order.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

from threadpoolctl import threadpool_limits

S = TypeVar("S")
T = TypeVar("T")

_inside = threading.local()


class _Limit:
    """The limit of this process's BLAS to one thread. The number is the process's, so the first user sets it
    and the last one lifts it.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._lift: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._lift = _set_limit()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._lift()


_limit = _Limit()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers() -> int:
    """Threads for work that numpy does outside of the interpreter's lock: one a core, 4 at most."""
    return min(cores(), 4)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within the block the BLAS of this process starts no threads of its own; blocks may be nested and may
    overlap.
    """
    with _limit:
        yield


def _set_limit() -> Callable[[], None]:
    """Sets the limit, and returns what lifts it. A thread of its own does both, because threadpoolctl
    ignores, without a word, whatever a thread other than the one that set a limit asks for while that limit
    is on.
    """
    begun, done = threading.Event(), threading.Event()

    def limit() -> None:
        try:
            with threadpool_limits(1, "blas"):
                begun.set()
                done.wait()
        finally:
            begun.set()  # also where that failed: nobody waits for ever

    def lift() -> None:
        done.set()
        thread.join()  # the limit is off before another one can be set

    thread = threading.Thread(target=limit, daemon=True)
    thread.start()
    begun.wait()
    return lift


def as_worker() -> None:
    """Says that this thread is one of several that share a work out, so that it shares out nothing itself."""
    _inside.worker = True


def in_order(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """``function`` of every item, by the threads, in the order of the items; no more is begun than what is
    soon taken.

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
