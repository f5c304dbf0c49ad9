"""A base or a pack by its name on a hub: a hub id, or an ``hf://`` reference."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import AdapterpackError, ConfigError, HubError, StorageError
from . import names

_OLD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""Bases of the first days have no owner on the public hub."""


def fetched(reference: str | os.PathLike[str]) -> Path:
    """The local copy of what a reference names on a hub, at a resolved commit.

    Raises:
        HubError: what the hub says to an ``hf://`` reference, by name.
        StorageError: it is nothing that the hub gives.
    """
    remote = is_remote(reference)
    wanted = _wanted(str(reference), remote)
    if wanted is None:
        raise StorageError("there is no such folder", where=reference, remedy="name a folder, or a hub model as hf://org/name")
    try:
        from .pull import local_copy  # noqa: PLC0415 - only a named hub pays for it

        artifact = local_copy(wanted) if names.is_repo(wanted.repo) else None
        return artifact or _base(wanted)
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


def _wanted(text: str, remote: bool) -> names.Reference | None:
    """What a hub could mean by it. A folder in a repository has to be said with hf://, for it looks like one on this disk."""
    address, _, revision = text.removeprefix(names.SCHEME).partition("@")
    if remote and _OLD.fullmatch(address):
        return names.Reference(address, revision or names.MAIN) if names.is_revision(revision or names.MAIN) else None
    try:
        found = names.parse(text)
    except ConfigError:
        return None
    return found if remote or not found.folder else None


def _base(wanted: names.Reference) -> Path:
    """A base model's files: the official client keeps them, and they are checked by what they contain."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a named hub pays for it

    from .transport.client import endpoint  # noqa: PLC0415
    from .transport.official import guarded_downloads  # noqa: PLC0415

    patterns = [f"{wanted.prefix}{pattern}" for pattern in ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model")]
    with guarded_downloads(endpoint()):
        return Path(snapshot_download(wanted.repo, revision=wanted.revision, endpoint=endpoint(), allow_patterns=patterns)) / wanted.folder


def _unreachable(reference: object, reason: str) -> StorageError:
    from .transport.client import redacted  # noqa: PLC0415

    return StorageError(f"neither a folder nor reachable on the hub: {redacted(reason.partition(chr(10))[0])[:200]}", where=reference,
                        remedy="check the name, the network and HF_ENDPOINT, or name a local folder")
