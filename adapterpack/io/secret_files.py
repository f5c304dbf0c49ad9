"""Protects files with secrets, which only their owner may read."""

from __future__ import annotations

import stat
from pathlib import Path

from ..errors import ConfigError, storage_errors


def require_private(path: Path) -> None:
    """Raises unless only its owner can read a file.

    Raises:
        ConfigError: others may read it.
        StorageError: the file is missing.
    """
    with storage_errors(path):
        mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            "others may read this file, which holds a secret", where=path, remedy=f"chmod 600 {path}"
        )
