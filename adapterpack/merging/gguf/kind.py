"""Whether a merge is into a GGUF file: told by its first bytes, before anything else is read of it."""

from __future__ import annotations

import os
from pathlib import Path

from ...base.gguf import MAGIC
from ...errors import storage_errors


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a base is a GGUF file, by its first bytes."""
    if not Path(path).is_file():
        return False
    with storage_errors(path), Path(path).open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
