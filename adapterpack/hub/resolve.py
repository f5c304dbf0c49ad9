"""A base or a pack by what the user typed: a folder, a hub id, or an ``hf://`` reference."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import StorageError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


def folder_of(reference: str | os.PathLike[str]) -> Path:
    """The local folder behind a reference; hub files are fetched at a resolved commit into the user's cache.

    Raises:
        StorageError: neither a folder, nor something that the hub gives.

    Example:
        >>> folder_of(".").is_dir()
        True
    """
    path = Path(reference)
    if path.exists():
        return path
    name, _, revision = str(reference).removeprefix("hf://").partition("@")
    remote = str(reference).startswith("hf://")
    if not _ID.fullmatch(name) or (not remote and (name.count("/") != 1 or str(reference).startswith("."))):
        raise StorageError("there is no such folder", where=reference, remedy="name a folder, or a hub model as hf://org/name")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a named hub pays for it

    try:
        return Path(snapshot_download(name, revision=revision or None,
                                      allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]))
    except Exception as error:
        reason = str(error).partition("\n")[0][:200]
        raise StorageError(f"neither a folder nor reachable on the hub: {type(error).__name__}: {reason}", where=reference,
                           remedy="check the name, the network and HF_ENDPOINT, or name a local folder") from error
