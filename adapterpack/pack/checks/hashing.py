"""The sha256 of what is in memory: of files on another core while the checks go on, of tensors on two."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from .budget import Budget

_BLOCK = 16 << 20
"""Bytes after which the clock is looked at; one call of the hash leaves the interpreter to other threads."""


@contextmanager
def hashed(held: Mapping[str, bytes], budget: Budget, known: Mapping[str, str] | None = None) -> Iterator[dict[str, Future[str]]]:
    """The sha256 (hex) of each file by its name, to be waited for; what nobody waited for ends with the block. Some may be ``known``.

    A file cannot be split over threads, and its tensors are hashed as well: both at once take as long as one.

    Example:
        >>> with hashed({"a": b""}, Budget()) as digests:
        ...     digests["a"].result()[:8]
        'e3b0c442'
    """
    stop = Event()

    def digest(data: bytes) -> str:
        return _digest(memoryview(data), budget, "the digests of the files", stop.is_set)

    def done(value: str) -> Future[str]:
        found: Future[str] = Future()
        found.set_result(value)
        return found

    with ThreadPoolExecutor(1) as pool:
        try:
            yield {name: done(known[name]) if known and name in known else pool.submit(digest, data) for name, data in held.items()}
        finally:
            stop.set()


def _digest(data: memoryview, budget: Budget, what: str, stopped: Callable[[], bool] = lambda: False) -> str:
    hasher = hashlib.sha256()
    for start in range(0, max(len(data), 1), _BLOCK):
        budget.require_time(what)
        if stopped():
            break
        hasher.update(data[start : start + _BLOCK])
    return hasher.hexdigest()


def each(buffers: Sequence[memoryview], budget: Budget, what: str) -> list[str]:
    """The sha256 (hex) of each of the ``buffers``, in their order, by two threads: where the files' are known, the other core is free.

    Half of them in a row to each thread, and not one by one: to hand over work takes about as long as to hash a small tensor.

    Raises:
        Spent: the budget, for ``what``.

    Example:
        >>> [digest[:8] for digest in each([memoryview(b""), memoryview(b"a")], Budget(), "digests")]
        ['e3b0c442', 'ca978112']
    """

    def digests(some: Sequence[memoryview]) -> list[str]:
        return [_digest(buffer, budget, what) for buffer in some]

    half = len(buffers) // 2
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(digests, buffers[half:])
        return [*digests(buffers[:half]), *rest.result()]
