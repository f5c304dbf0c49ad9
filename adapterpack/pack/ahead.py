"""A pack's tensors read and hashed ahead: while a command imports numpy, which takes one core, another one does this.

Nothing is decided here. Whoever loads the pack parses these very bytes and checks them as any others; it is only spared the hashing. Two
long calls, and not one a tensor: each time that a thread comes back for the interpreter's lock, the import stands still.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from ..errors import AdapterpackError
from ..io.safe_open import LARGE, TENSORS, read_file


class Ahead(NamedTuple):
    """The bytes of a tensor file, and their sha256 as hex."""

    data: bytes
    sha256: str


def read_ahead(folder: Path) -> Ahead | None:
    """The tensor file of the pack in ``folder``; None where it is large, or cannot be read, which is told by whoever needs it.

    Example:
        >>> read_ahead(Path("no-such-folder"))
    """
    path = folder / TENSORS
    try:
        if not path.is_file() or path.stat().st_size > LARGE:
            return None
        data = read_file(path, LARGE + 1)
    except (OSError, AdapterpackError):
        return None
    return Ahead(data, hashlib.sha256(data).hexdigest())
