"""Recognizes the pack, bundle or PEFT adapter in a repository, reads its manifest, and compares the
repository's listing with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..bundle import FILE_NAME as BUNDLE
from ..bundle import parse_bundle
from ..errors import FormatError, HubError
from ..io import TENSORS
from ..manifest import manifest as m
from ..manifest.manifest import FileEntry
from ..pack import MUTABLE, SIGNATURE, require_unrevoked_signer, revocations
from ..pack.validate.checks import Finding
from ..pack.validate.checks import folder as files
from ..peft import layout
from .transport import ListedFile, Remote, fetch

KINDS = {m.FILE_NAME: "pack", BUNDLE: "bundle", layout.CONFIG: "peft"}
"""The file that marks an artifact -> its kind. The first one that a repository has decides."""
CLOSED = (m.FILE_NAME, BUNDLE)
"""The marks of artifacts whose manifest lists every file of their folder."""
MAX_BYTES = 64 << 30
_MAX_MARK = 16 << 20
_MAX_SIGNATURE = 1 << 20
_PEFT_LIMIT = 8 << 30
_TOO_LARGE = "the artifact is larger than allowed"


@dataclass(frozen=True)
class Artifact:
    """A pack, a bundle or a PEFT adapter in a repository.

    ``manifest_bytes`` are those of its manifest file (for PEFT its config), ``files`` are the other files to
    download, and ``id`` is the digest of the manifest.
    """

    kind: str
    manifest_name: str
    manifest_bytes: bytes
    files: tuple[FileEntry, ...]
    manifest: Any

    @property
    def id(self) -> str:
        """``sha256:`` and the digest of the manifest's bytes."""
        return f"sha256:{hashlib.sha256(self.manifest_bytes).hexdigest()}"

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return len(self.manifest_bytes) + sum(entry.size for entry in self.files)


def kind_in(listed: Mapping[str, ListedFile]) -> str | None:
    """Returns the kind of artifact in a listing, or None if there is none, as for a base model."""
    return next((kind for mark, kind in KINDS.items() if mark in listed), None)


def open_remote(
    remote: Remote, listed: Mapping[str, ListedFile], scratch: Path, max_bytes: int = MAX_BYTES
) -> Artifact:
    """Reads the manifest only. Downloads nothing else, and does not yet compare the listing with it.

    Raises:
        FormatError: the manifest cannot be read, or the artifact is too large.
        HubError: there is no artifact in the repository.
        Revoked: its signature names a key that is revoked.
    """
    mark = next((name for name in KINDS if name in listed), None)
    if mark is None:
        raise HubError(
            "the repository holds neither a pack nor a bundle nor a PEFT adapter",
            where=remote,
            expected=" or ".join(KINDS),
            found=", ".join(sorted(listed)[:5]) or "nothing",
            remedy="name the repository of an adapter",
        )
    where = f"{remote}, {mark}"
    kind = KINDS[mark]
    require_at_most(_MAX_MARK, listed[mark].size, "the manifest is too large", where)
    if SIGNATURE in listed:
        size = listed[SIGNATURE].size
        place = f"{remote}, {SIGNATURE}"
        require_at_most(_MAX_SIGNATURE, size, "the signature is too large", place)
        if revocations():
            fetch(remote, listed[SIGNATURE], scratch / SIGNATURE)
            require_unrevoked_signer(scratch)
            (scratch / SIGNATURE).unlink()  # no part of the artifact
    fetch(remote, listed[mark], scratch / mark)
    data = (scratch / mark).read_bytes()
    manifest: Any = None
    if kind == "peft":
        files: tuple[FileEntry, ...] = (_tensors_of_peft(remote, listed),)
    else:
        manifest = m.parse(data, where) if kind == "pack" else parse_bundle(data, where)
        files = manifest.files
    artifact = Artifact(kind, mark, data, files, manifest)
    remedy = "raise the limit (--max-bytes) if you trust it"
    require_at_most(max_bytes, artifact.size, _TOO_LARGE, remote, remedy)
    return artifact


def require_at_most(limit: int, size: int, what: str, where: object, remedy: str | None = None) -> None:
    """Checks that something on a hub has at most ``limit`` bytes.

    Raises:
        FormatError: it has more; ``what`` says it in words.
    """
    if size > limit:
        raise FormatError(what, where=where, expected=f"at most {limit} bytes", found=size, remedy=remedy)


def _tensors_of_peft(remote: Remote, listed: Mapping[str, ListedFile]) -> FileEntry:
    tensors = listed.get(TENSORS)
    if tensors is None:
        pickled = [name for name in listed if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        raise FormatError(
            "a PEFT adapter without safetensors" + (": pickle files are refused" if pickled else ""),
            where=remote,
            expected=TENSORS,
            found=", ".join(sorted(pickled)) or "no tensors",
            remedy="save it as safetensors",
        )
    require_at_most(_PEFT_LIMIT, tensors.size, _TOO_LARGE, remote)
    return FileEntry(TENSORS, tensors.size, tensors.sha256 or "", "tensors")


def require_closed(remote: Remote, artifact: Artifact, listed: Mapping[str, ListedFile]) -> None:
    """Checks that the repository contains exactly the files that the manifest lists.

    Raises:
        FormatError: a file is missing, superfluous or different.
    """
    if bad := next(differences(artifact, listed), None):
        raise FormatError(
            f"the repository is not what its manifest lists, {bad.rule}: {bad.message}",
            where=f"{remote}, {bad.where}",
            remedy="do not use this revision; its owner can push the artifact again",
        )


_RULES = {
    "pack": (files.FORBIDDEN.id, files.UNLISTED.id, files.MISSING.id, files.SIZE.id, files.DIGEST.id),
    "bundle": ("AB102", "AB102", "AB103", "AB104", "AB104"),
}


def differences(artifact: Artifact, listed: Mapping[str, ListedFile]) -> Iterator[Finding]:
    """Yields the differences between listing and manifest; none for a PEFT adapter, which lists no files."""
    if artifact.kind not in _RULES:
        return
    forbidden, unlisted, missing, size, digest = _RULES[artifact.kind]

    def at(rule: str, path: str, message: str) -> Finding:
        return Finding(rule, "error", path, message, "push the artifact again", file=path)

    entries = {entry.path: entry for entry in artifact.files}
    for path in sorted(listed.keys() - entries.keys() - MUTABLE - {artifact.manifest_name}):
        if PurePosixPath(path).suffix.casefold() in files.FORBIDDEN_SUFFIXES:
            yield at(forbidden, path, "a file of a kind that may not lie there")
        else:
            yield at(unlisted, path, "a file that the manifest does not list")
    for path, entry in sorted(entries.items()):
        file = listed.get(path)
        if file is None:
            yield at(missing, path, "a listed file is missing")
        elif file.size != entry.size:
            yield at(size, path, f"the file has {file.size} bytes, the manifest says {entry.size}")
        elif file.sha256 not in {None, entry.sha256}:
            yield at(digest, path, "the file's sha256 is not the manifest's: it was altered")
