"""One thread of linear algebra at each site, and threads over sites: what comes out does not depend on how many there are.

A product of matrices that several threads share is added up in an order that their number decides, so its last bits do too. Sites are
independent, so they are what is shared out: each is worked on by one thread from beginning to end.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from .spectra import workers

S, T = TypeVar("S"), TypeVar("T")

_lock = threading.Lock()
_open = 0
"""How many blocks are open: the library's setting is one for the whole process."""
_holder: tuple[threading.Thread, threading.Event] | None = None


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Inside, the library behind numpy's linear algebra works with one thread; as it was afterwards. Blocks may overlap.

    Example:
        >>> with one_thread_each():
        ...     each_site(lambda value: value * 2, [1, 2])
        [2, 4]
    """
    global _open, _holder
    with _lock:
        if not _open:
            _holder = _held()
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open and _holder is not None:
                thread, done = _holder
                done.set()
                thread.join()
                _holder = None


def _held() -> tuple[threading.Thread, threading.Event]:
    """A thread that holds the limit until it is told: threadpoolctl lets nobody lift it but the thread that set it."""
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        from threadpoolctl import threadpool_limits  # noqa: PLC0415 - what composes nothing does not pay for it

        try:
            with threadpool_limits(1, user_api="blas"):
                begun.set()
                done.wait()
        finally:
            begun.set()

    thread = threading.Thread(target=hold, name="adapterpack-one-thread", daemon=True)
    thread.start()
    begun.wait()
    return thread, done


def each_site(work: Callable[[S], T], sites: Sequence[S], most: int = 64) -> list[T]:
    """``work`` of every site, by ``most`` threads or fewer, in the order of the sites; under the caller's settings (``np.errstate``)."""
    threads = min(most, workers(), len(sites))
    if threads < 2:
        return [work(site) for site in sites]
    context = contextvars.copy_context()
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda site: context.copy().run(work, site), sites))
