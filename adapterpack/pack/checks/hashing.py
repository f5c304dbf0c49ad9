"""The sha256 of files that are in memory, computed on another core while the checks go on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from .budget import Budget

_BLOCK = 16 << 20
"""Bytes after which the clock is looked at; one call of the hash leaves the interpreter to other threads."""


@contextmanager
def hashed(held: Mapping[str, bytes], budget: Budget) -> Iterator[dict[str, Future[str]]]:
    """The sha256 (hex) of each file by its name, to be waited for; what nobody waited for ends with the block.

    A file cannot be split over threads, and its tensors are hashed as well: both at once take as long as one.

    Example:
        >>> with hashed({"a": b""}, Budget()) as digests:
        ...     digests["a"].result()[:8]
        'e3b0c442'
    """
    stop = Event()

    def digest(data: bytes) -> str:
        hasher, view = hashlib.sha256(), memoryview(data)
        for start in range(0, len(view), _BLOCK):
            budget.require_time("the digests of the files")
            if stop.is_set():
                break
            hasher.update(view[start : start + _BLOCK])
        return hasher.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        try:
            yield {name: pool.submit(digest, data) for name, data in held.items()}
        finally:
            stop.set()
