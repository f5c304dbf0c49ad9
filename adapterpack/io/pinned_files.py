"""Keeps descriptors of files open for as long as an object reads from them, so that it reads the file that
was checked even after another takes its name.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path

from .safe_open import open_inside

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_FOR_OTHERS = 256
"""Descriptors reserved for connections, graphs and libraries."""
_lock = threading.RLock()
"""Reentrant, because the garbage collector may close a file while another is opened."""
_held: set[int] = set()


def allow_more_files() -> None:
    """Raises this process's limit of open files to the hard limit."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        except (OSError, ValueError):  # macOS has a lower limit of its own, and does not name it
            return


def room() -> int:
    """Returns how many more files may be kept open: half of the limit, minus the reserve; 0 on systems
    without positioned reads.
    """
    if resource is None or not hasattr(os, "preadv"):
        return 0
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 20 if allowed == resource.RLIM_INFINITY else allowed
    return max(0, (most - _FOR_OTHERS) // 2 - len(_held))


def kept_open(path: Path, owner: object) -> int | None:
    """Returns a descriptor of a file that stays open until ``owner`` is garbage-collected; None if the
    process has no room for another.

    Raises:
        FormatError: it is not a regular file, or a link leads out of its folder.
        StorageError: the file system refuses.
    """
    with _lock:
        if not room():
            return None
        with open_inside(path) as file:
            descriptor = os.dup(file.fileno())
        _held.add(descriptor)
    weakref.finalize(owner, _close, descriptor)
    return descriptor


def _close(descriptor: int) -> None:
    with _lock:
        _held.discard(descriptor)
    os.close(descriptor)
