"""Files with secrets, which nobody but their owner may read."""

from __future__ import annotations

import stat
from pathlib import Path

from ..errors import ConfigError, storage_errors


def require_private(path: Path) -> None:
    """Checks that a file with a secret can be read by its owner alone.

    Raises:
        ConfigError: others may read it.
        StorageError: it is not there.
    """
    with storage_errors(path):
        mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            "others may read this file, which holds a secret", where=path, remedy=f"chmod 600 {path}"
        )
