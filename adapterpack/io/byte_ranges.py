"""Reads, writes and copies byte ranges of files completely, although one system call may process only a
part.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import FormatError
from .safe_open import fill

_NO_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
"""The errors of ``copy_file_range`` where the kernel or the file system lacks it."""
_PIECE = 16 << 20
"""The most bytes that are copied at once through memory."""


@contextmanager
def open_descriptor(path: Path, flags: int) -> Iterator[int]:
    """Yields a file descriptor, closed at the end."""
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_into(descriptor: int, buffer: np.ndarray, offset: int) -> None:
    """Fills the contiguous ``buffer`` with the bytes at ``offset``.

    Raises:
        FormatError: the file ends first, because it was truncated meanwhile.
    """
    if not fill(descriptor, memoryview(buffer.reshape(-1).view(np.uint8).data), offset):
        raise FormatError(
            "a file became shorter while it was read",
            expected=f"{buffer.nbytes} bytes at byte {offset}",
            remedy="fetch the file again, and start again once nothing writes to it",
        )


def write_all(descriptor: int, buffer: np.ndarray, offset: int) -> None:
    """Writes the contiguous ``buffer`` at ``offset``."""
    view = memoryview(buffer.reshape(-1).view(np.uint8).data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset += count


def reserve(descriptor: int, size: int) -> None:
    """Makes a file ``size`` bytes long, keeping its contents, and allocates its blocks at once where the file
    system can.

    Allocated blocks make later writes faster. Calls the kernel's ``fallocate``, whose failure is ignored,
    because ``os.posix_fallocate`` would write into every block on file systems that cannot allocate.
    """
    os.truncate(descriptor, size)
    if size and sys.platform == "linux" and sys.maxsize > 1 << 32:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))


class Span(NamedTuple):
    """A byte range (``start``, ``nbytes``) and the ``offset`` to copy it to."""

    start: int
    offset: int
    nbytes: int


def copy_span(source: int, sink: int, span: Span, buffer: Callable[[int], np.ndarray]) -> None:
    """Copies a span inside the kernel if possible, else piece by piece through ``buffer(count)``, an array of
    that many bytes.

    Raises:
        FormatError: the source ends first, because it was truncated meanwhile.
    """
    start, offset, left = span
    try:
        while left and hasattr(os, "copy_file_range"):
            count = os.copy_file_range(source, sink, left, start, offset)
            if count == 0:
                break
            start += count
            offset += count
            left -= count
    except OSError as error:
        if error.errno not in _NO_COPY:
            raise
    while left:
        piece = buffer(min(left, _PIECE))
        read_into(source, piece, start)
        write_all(sink, piece, offset)
        start += len(piece)
        offset += len(piece)
        left -= len(piece)
