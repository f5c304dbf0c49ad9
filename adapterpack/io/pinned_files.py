"""Descriptors of files that stay open for as long as something reads from them: what was checked is read,
whatever has its name by then.
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
"""Descriptors that are left for connections, graphs and libraries."""
_lock = threading.RLock()
"""Taken again where the collector closes a file while one is opened."""
_held: set[int] = set()


def allow_more_files() -> None:
    """Raises the number of files that this process may have open to what its administrator allows."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        except (OSError, ValueError):  # macOS has a lower limit of its own, and does not name it
            return


def room() -> int:
    """How many more files may be kept open: half of what the process may have, without those that others
    need; 0 on systems whose files cannot be read at a place of one's own.
    """
    if resource is None or not hasattr(os, "preadv"):
        return 0
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 20 if allowed == resource.RLIM_INFINITY else allowed
    return max(0, (most - _FOR_OTHERS) // 2 - len(_held))


def kept_open(path: Path, owner: object) -> int | None:
    """A descriptor of a file, open until ``owner`` is given up; None where the process has no room for one
    more.

    Raises:
        FormatError: it is no regular file, or a link leads out of its folder.
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
