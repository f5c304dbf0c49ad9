"""Finds the folder that a user means: a local folder, a hub id, or an ``hf://`` reference, which it
downloads.
"""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path

from ..base import is_repo
from ..errors import AdapterpackError, ConfigError, HubError, StorageError, closest
from ..paths import StrPath
from .transport import endpoint, guarded_downloads, names, redact

_WITHOUT_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""The name of a repository without an owner, as the oldest models of the public hub have."""
_MOST_NAMES = 10_000
"""The most names in a folder that are compared with a mistyped one."""


def folder_of(reference: StrPath) -> Path:
    """Returns the local folder of a reference; files of a hub are fetched at a resolved commit into the
    user's cache.

    A pack, a bundle or a PEFT adapter is pulled into the local store and validated; anything else is treated
    as a base model.

    Raises:
        HubError: the hub refuses an ``hf://`` reference; the subclass says why.
        StorageError: there is neither such a folder nor such a repository.

    Example:
        >>> folder_of(".").is_dir()
        True
    """
    path = Path(reference)
    return path if path.exists() else _download(str(reference))


def folder_at_hand(reference: StrPath, revision: str | None = None) -> Path | None:
    """Returns the folder of a reference if it is on this machine, as a local folder or a base in the hub's
    cache, else None. Fetches nothing.
    """
    path = Path(reference)
    parsed = None if path.exists() else _parse(str(reference), is_remote(reference))
    if parsed is None:
        return path if path.exists() else None
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a named hub pays for it
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return (
            Path(snapshot_download(parsed.repo, revision=revision or parsed.revision, local_files_only=True))
            / parsed.folder
        )
    except LocalEntryNotFoundError:
        return None


def is_remote(reference: object) -> bool:
    """Returns whether a reference explicitly names a hub."""
    return str(reference).startswith(names.SCHEME)


def _download(text: str) -> Path:
    remote = is_remote(text)
    reference = _parse(text, remote)
    if reference is None:
        raise StorageError(
            "there is no such file or folder here",
            where=text,
            remedy=f"{near_path(text)}name one that is there, or a repository of a hub as hf://org/name",
        )
    from .pull import local_copy  # noqa: PLC0415 - every command imports this module, and few of them a hub

    try:
        artifact = local_copy(reference) if is_repo(reference.repo) else None
        return artifact or _base(reference)
    except HubError as error:
        if remote:
            raise
        raise _not_found(text, str(error)) from error
    except AdapterpackError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise (_unreachable(text, reason) if remote else _not_found(text, reason)) from error


def _parse(text: str, remote: bool) -> names.HubReference | None:
    """Parses a text as a hub reference. A folder in a repository needs the prefix ``hf://``, because it looks
    like a local path.
    """
    address, _, revision = text.removeprefix(names.SCHEME).partition("@")
    if remote and _WITHOUT_OWNER.fullmatch(address):
        return (
            names.HubReference(address, revision or names.MAIN)
            if names.is_revision(revision or names.MAIN)
            else None
        )
    try:
        reference = names.parse(text)
    except ConfigError:
        return None
    return reference if remote or not reference.folder else None


def _base(reference: names.HubReference) -> Path:
    """Downloads a base model with the official client, whose cache keeps it. Its contents are checked when it
    is read.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a named hub pays for it

    patterns = [
        f"{reference.prefix}{pattern}"
        for pattern in ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model")
    ]
    with guarded_downloads(endpoint()):
        folder = snapshot_download(
            reference.repo, revision=reference.revision, endpoint=endpoint(), allow_patterns=patterns
        )
    return Path(folder) / reference.folder


def _unreachable(reference: str, reason: str) -> StorageError:
    return StorageError(
        f"not reachable on the hub: {_first_sentence(reason)}",
        where=reference,
        remedy="check the name, the network and HF_ENDPOINT, or name a local folder",
    )


def _not_found(text: str, reason: str) -> StorageError:
    """Makes the error for a text that is no local path but looks like a repository: most people who type it
    mean a path.
    """
    return StorageError(
        "there is no such file or folder here",
        where=text,
        remedy=f"{near_path(text)}name one that is there. If a repository of a hub is meant (org/name, or "
        "hf://org/name): it did not come, check the name, the network and HF_ENDPOINT "
        f"({_first_sentence(reason)})",
    )


def _first_sentence(reason: str) -> str:
    return redact(reason.partition("\n")[0].partition(". ")[0])[:200].rstrip(".")


def near_path(text: str) -> str:
    """Returns the start of a remedy with the existing path closest to a mistyped one, if one is close."""
    path = Path(text)
    there = next((parent for parent in path.parents if parent.is_dir()), None)
    if there is None:
        return ""
    missing = path.relative_to(there).parts[0]
    try:
        with os.scandir(there) as listing:
            names = [entry.name for entry in islice(listing, _MOST_NAMES)]
    except OSError:
        return ""
    close = closest(missing, names)
    return "" if close is None else f"did you mean '{there / close}'? If not, "
