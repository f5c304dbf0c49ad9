"""A base or a pack by what the user typed: a folder, a hub id, or an ``hf://`` reference."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import AdapterpackError, HubError, StorageError
from . import names

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


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
    name, _, revision = str(reference).removeprefix(names.SCHEME).partition("@")
    remote = is_remote(reference)
    if not _ID.fullmatch(name) or (not remote and (name.count("/") != 1 or str(reference).startswith("."))):
        raise StorageError("there is no such folder", where=reference, remedy="name a folder, or a hub model as hf://org/name")
    try:
        from .pull import local_copy  # noqa: PLC0415 - only a named hub pays for it

        artifact = local_copy(names.parse(str(reference))) if names.is_repo(name) else None
        return artifact or _base(name, revision or None)
    except HubError as error:
        if remote:
            raise
        raise _unreachable(reference, str(error)) from error
    except AdapterpackError:
        raise
    except Exception as error:
        raise _unreachable(reference, f"{type(error).__name__}: {error}") from error


def is_remote(reference: object) -> bool:
    """Whether a reference names a hub beyond doubt."""
    return str(reference).startswith(names.SCHEME)


def _base(name: str, revision: str | None) -> Path:
    """A base model's files: the official client keeps them, and they are checked by what they contain."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a named hub pays for it

    from .client import endpoint  # noqa: PLC0415

    return Path(snapshot_download(name, revision=revision, endpoint=endpoint(),
                                  allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]))


def _unreachable(reference: object, reason: str) -> StorageError:
    from .client import redacted  # noqa: PLC0415

    return StorageError(f"neither a folder nor reachable on the hub: {redacted(reason.partition(chr(10))[0])[:200]}", where=reference,
                        remedy="check the name, the network and HF_ENDPOINT, or name a local folder")
