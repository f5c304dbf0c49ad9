"""Distributes work over a few threads, each of which runs its BLAS calls single-threaded.

A matrix product that BLAS splits over its own threads rounds differently for each number of threads, and its
threads compete with those that call it: two by two threads on two cores took twenty times as long as one
each. With one thread per product, results depend neither on the number of cores nor on ``OMP_NUM_THREADS``,
provided that the division of work depends on shapes alone and sums are added in a fixed order.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from typing import TypeVar

from threadpoolctl import threadpool_limits

S = TypeVar("S")
T = TypeVar("T")

_inside = threading.local()


class _Limit:
    """Limits this process's BLAS to one thread. The limit is per process, so the first user sets it and the
    last one lifts it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
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
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers() -> int:
    """Returns how many threads to use for numpy work outside of the interpreter's lock: one per core, at most
    4.
    """
    return min(cores(), 4)


def one_thread_each() -> AbstractContextManager[None]:
    """Stops BLAS from starting threads of its own, inside the block; blocks may nest and overlap."""
    return _limit


def _set_limit() -> Callable[[], None]:
    """Sets the limit and returns a function that lifts it.

    A separate thread does both, because threadpoolctl silently ignores requests from any thread other than
    the one that set the current limit.
    """
    begun, done = threading.Event(), threading.Event()

    def limit() -> None:
        try:
            with threadpool_limits(1, "blas"):
                begun.set()
                done.wait()
        finally:
            # Set even after a failure, so that the caller does not wait forever.
            begun.set()

    def lift() -> None:
        done.set()
        # Wait until the limit is lifted, before another one is set.
        thread.join()

    thread = threading.Thread(target=limit, daemon=True)
    thread.start()
    begun.wait()
    return lift


def as_worker() -> None:
    """Marks this thread as a worker, so that it does not distribute its own work further."""
    _inside.worker = True


def in_order(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yields ``function`` of every item in order, computed by the threads; starts only a few items ahead of
    the consumer.

    A worker thread computes its own nested work alone.

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
