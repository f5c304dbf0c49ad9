"""A base or a pack by what the user typed: a folder, a hub id, or an ``hf://`` reference."""

from __future__ import annotations

import os
from pathlib import Path


def folder_of(reference: str | os.PathLike[str]) -> Path:
    """The local folder behind a reference; hub files are fetched at a resolved commit into the user's cache.

    A pack, a bundle or a PEFT adapter is pulled into the local store, validated; anything else is a base.

    Raises:
        HubError: what the hub says to an ``hf://`` reference, by name.
        StorageError: neither a folder, nor something that the hub gives.

    Example:
        >>> folder_of(".").is_dir()
        True
    """
    path = Path(reference)
    if path.exists():
        return path
    from .named import fetched  # noqa: PLC0415 - only a named hub pays for it

    return fetched(reference)
