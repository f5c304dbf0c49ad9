"""Pulls an artifact from a hub: resolves the commit, reads the manifest, and downloads only the files that it
lists, hashed on arrival.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from ..base import is_repo
from ..errors import AdapterpackError, FormatError, HubOffline, StorageError, storage_errors
from ..io import (
    Json,
    Progress,
    cache_folder,
    copy_folder,
    output_folder,
    own_folder,
    refuse_existing,
    strict_json,
)
from ..manifest import manifest as m
from ..pack import SIGNATURE, Pack, load, seal
from ..pack.validate.checks import read_manifest
from ..paths import StrPath
from . import bundle_cache
from .artifact import KINDS, MAX_BYTES, Artifact, kind_in, open_remote, require_closed
from .base import RemoteBase, remote_base
from .lockfile import Lockfile, PinnedArtifact, machine_lockfile
from .transport import ListedFile, Remote, connect, fetch, names, offline, parse_address, remove_old, tree

_SPARE = 256 << 20
"""Bytes of disk space that a download leaves free."""
_KEPT_SECONDS = 2 * 86_400
"""Seconds after which the leftovers of a killed process are removed."""


@dataclass(frozen=True)
class Pulled:
    """A validated artifact on this machine: its source, its identity, and its ``path``. ``folder`` is its
    folder in the repository, "" for the complete repository.

    ``changed`` describes in words what an update changed, ``before`` is the earlier pin in the lock file, and
    ``notes`` are further remarks.
    """

    repo: str
    folder: str
    revision: str
    commit: str
    kind: str
    id: str
    path: Path
    before: PinnedArtifact | None = None
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """Returns the result as JSON values."""
        return dict(strict_json.plain({**vars(self), "path": str(self.path)}))


def pull(
    source: str,
    out: StrPath | None = None,
    *,
    update: bool = False,
    lock: StrPath | None = None,
    max_bytes: int = MAX_BYTES,
    token: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pulled:
    """Pulls a pack or a bundle from a hub or a registry into the local store, and into a folder where one is
    named; only what is valid is kept.

    A registry of containers is named by ``oci://HOST/NAME`` with ``:TAG`` or ``@sha256:DIGEST``. With a
    ``lock`` file it fetches what the file pins, whatever the revision means by now; ``update`` pins the
    current meaning. A PEFT adapter becomes a pack. Without a network (``HF_HUB_OFFLINE``) it hashes and
    returns what was pulled before. An interrupted download of a large file resumes, also in a later pull.
    ``progress`` is called with (bytes done, bytes in all).

    Raises:
        FormatError: the artifact is larger than ``max_bytes``, not what its manifest lists, or not valid.
        HubError: the hub refuses (RepoNotFound, GatedRepo, RevisionNotFound, HubOffline).
        OutputExists: something is already at ``out``.

    Example:
        >>> pull("hf://org/tickets@v1", "packs/tickets").kind  # doctest: +SKIP
        'pack'
    """
    reference = parse_address(source)
    refuse_existing(out)
    file = None if lock is None else Lockfile(lock)
    before = None if file is None else file.get(reference)
    pulled = (
        _offline(reference, before, update)
        if offline()
        else _online(reference, before, update, max_bytes, token, progress)
    )
    pinned = PinnedArtifact(pulled.commit, pulled.kind, pulled.id)
    if file is not None and pinned != before:
        file.put(reference, pinned)
    if out is None:
        return pulled
    with output_folder(out) as folder:
        copy_folder(pulled.path, folder)
        _add_signature(pulled, reference, folder, token)
    return replace(pulled, path=Path(out))


def fetch_artifact(
    remote: Remote,
    listed: dict[str, ListedFile],
    max_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
) -> Pulled:
    """Returns the artifact of a commit, from the store or the hub, and records it for use without a
    network.
    """
    with scratch_folder() as name:
        scratch = Path(name) / remote.reference.name  # an imported adapter gets the name of its folder
        scratch.mkdir()
        artifact = open_remote(remote, listed, scratch, max_bytes)
        require_closed(remote, artifact, listed)
        identity = artifact.id
        path = None if artifact.kind == "peft" else bundle_cache.find_bundle(artifact.kind, artifact.id)
        notes: tuple[str, ...] = ()
        if path is None:
            download(remote, artifact, listed, scratch, progress)
            staged: Path | Pack = scratch
            if artifact.kind == "peft":
                staged, about_base = _import_peft(scratch, remote.token)
                notes = ("a PEFT adapter: imported as a pack", *about_base)
            identity, path = bundle_cache.store(artifact.kind, artifact.id, staged)
    pinned = PinnedArtifact(remote.commit, artifact.kind, identity)
    for reference in {remote.reference, remote.pinned}:
        machine_lockfile(reference).put(reference, pinned)
    return _describe_pull(remote.reference, pinned, path, notes)


def _online(
    reference: names.HubReference,
    before: PinnedArtifact | None,
    update: bool,
    max_bytes: int,
    token: str | None,
    progress: Progress | None,
) -> Pulled:
    pinned = before is not None and not update
    remote = connect(reference.at(before.commit) if before and pinned else reference, token)
    pulled = replace(fetch_artifact(remote, tree(remote), max_bytes, progress), revision=reference.revision)
    if before is None:
        return pulled
    if update:
        return replace(pulled, before=before, changed=_changes(before, pulled.kind, pulled.id, pulled.path))
    if pulled.kind != "peft":
        _require_pinned(pulled, before, remote)
    now = connect(reference, token).commit
    moved = (
        ()
        if now == before.commit
        else (f"{reference.revision} is at {now} by now; the lock file pins {before.commit} (--update)",)
    )
    return replace(pulled, notes=(*pulled.notes, *moved))


def _offline(reference: names.HubReference, before: PinnedArtifact | None, update: bool) -> Pulled:
    """Returns what was pulled before, by the lock file or this machine's own record."""
    pinned = before or machine_lockfile(reference).get(reference)
    if update or pinned is None:
        raise HubOffline(
            "the network may not be used, and this was not pulled before",
            where=reference,
            remedy="unset HF_HUB_OFFLINE and pull it once",
        )
    path = bundle_cache.find_bundle(pinned.kind, pinned.id)
    if path is None:
        raise HubOffline(
            "the network may not be used, and what was pulled is not in the store any more",
            where=reference,
            expected=pinned.id,
            remedy="unset HF_HUB_OFFLINE and pull it again",
        )
    return _describe_pull(reference, pinned, path, ("from the store: no network",))


def pinned_artifact(reference: names.HubReference, pinned: PinnedArtifact) -> Path:
    """Returns the folder of a pinned artifact, from the store or from the hub at its commit.

    Raises:
        FormatError: the hub has another artifact at that commit, or a PEFT adapter now imports as another
            pack.
        HubError: the hub refuses; the subclass says why.
    """
    path = bundle_cache.find_bundle(pinned.kind, pinned.id)
    if path is not None or offline():
        return path or _offline(reference, pinned, False).path
    remote = connect(reference.at(pinned.commit))
    pulled = fetch_artifact(remote, tree(remote))
    _require_pinned(pulled, pinned, remote)
    return pulled.path


def _require_pinned(pulled: Pulled, pinned: PinnedArtifact, remote: Remote) -> None:
    if pulled.id != pinned.id:
        raise FormatError(
            "the commit holds another artifact than the lock file pins",
            where=remote,
            expected=pinned.id,
            found=pulled.id,
            remedy="ask who owns the repository; --update accepts it",
        )


def download(
    remote: Remote,
    artifact: Artifact,
    listed: Mapping[str, ListedFile],
    scratch: Path,
    progress: Progress | None = None,
) -> None:
    """Downloads every file except the manifest into the folder that holds it; each is hashed on arrival.

    Raises:
        FormatError: a file differs from the listing.
        StorageError: the disk has too little space.
    """
    free = shutil.disk_usage(scratch).free
    # a pack needs space twice: as downloaded, and in the store
    needed = artifact.size * (1 if artifact.kind == "bundle" else 2) + _SPARE
    if needed > free:
        raise StorageError(
            "the disk has too little space for this artifact",
            where=cache_folder(),
            expected=f"{needed} bytes",
            found=free,
            remedy="free some, or set ADAPTERPACK_CACHE to another disk",
        )
    done = 0
    total = sum(entry.size for entry in artifact.files)

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    for entry in artifact.files:
        place = scratch / entry.path
        with storage_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        fetch(remote, listed[entry.path], place, entry.sha256 or None, tell)


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Makes a folder for incoming files, on the disk of the cache."""
    place = own_folder(cache_folder() / "incoming")
    with storage_errors(place):
        remove_old(place, _KEPT_SECONDS)
        return tempfile.TemporaryDirectory(dir=place)


def _add_signature(pulled: Pulled, reference: names.HubReference, folder: Path, token: str | None) -> None:
    """Downloads the detached signature. The store does not keep it, since it is not part of the pack or
    bundle.
    """
    if pulled.kind == "peft" or offline():
        return
    remote = connect(reference.at(pulled.commit), token)
    if signature := tree(remote).get(SIGNATURE):
        fetch(remote, signature, folder / SIGNATURE)


def _describe_pull(
    reference: names.HubReference, pinned: PinnedArtifact, path: Path, notes: tuple[str, ...]
) -> Pulled:
    return Pulled(
        reference.repo,
        reference.folder,
        reference.revision,
        pinned.commit,
        pinned.kind,
        pinned.id,
        path,
        notes=notes,
    )


def local_copy(
    reference: names.HubReference, kinds: Collection[str] = frozenset(KINDS.values())
) -> Path | None:
    """Returns the folder of the artifact that a reference names, or None if the repository holds none of
    these kinds, as for a base model.

    Raises:
        HubError: the hub refuses; the subclass says why.
    """
    if offline():
        pinned = machine_lockfile(reference).get(reference)
        if pinned is None or pinned.kind not in kinds:
            return None
        return _offline(reference, pinned, False).path
    remote = connect(reference)
    listed = tree(remote)
    return fetch_artifact(remote, listed).path if kind_in(listed) in kinds else None


def _import_peft(folder: Path, token: str | None) -> tuple[Pack, tuple[str, ...]]:
    """Imports a PEFT folder and returns the pack, with its base identified if the hub has it, and notes about
    that.

    Raises:
        FormatError, Unsupported: the folder cannot be imported.
    """
    pack = load(folder)
    hint = pack.manifest.base
    if hint.name is None or not is_repo(hint.name):
        return pack, (f"its base is known by name only: {hint.name or 'none is named'}",)
    try:
        with scratch_folder() as scratch:
            there = names.HubReference(hint.name, hint.commit or names.MAIN)
            base = remote_base(there, Path(scratch), token)
            pack.require_base(base, allow_structural=True)
            return _with_base(pack, base), (
                f"its base was identified by the listing and the headers of {base.remote}",
            )
    except AdapterpackError as error:
        return pack, (f"its base {hint.name} is known by name only: {error.what}",)


def _with_base(pack: Pack, base: RemoteBase) -> Pack:
    fingerprint = base.fingerprint()
    model_type = base.config.get("model_type")
    identified = structs.replace(
        pack.manifest.base,
        commit=base.commit,
        structure=fingerprint.structure,
        files=fingerprint.files,
        model_type=model_type if isinstance(model_type, str) else None,
    )
    return seal(structs.replace(pack.manifest, base=identified), pack.tensors, pack.extra)


def _changes(before: PinnedArtifact, kind: str, identity: str, path: Path) -> tuple[str, ...]:
    """Returns the differences between the pinned artifact and the one pulled now; none if they are
    the same.
    """
    if (before.kind, before.id) == (kind, identity):
        return ()
    lines = [f"kind: {before.kind} -> {kind}"] if before.kind != kind else []
    lines.append(f"id: {before.id} -> {identity}")
    old = bundle_cache.find_bundle(before.kind, before.id)
    if old is None:
        return (*lines, "what was pinned is not in the store any more: no closer look")
    if "bundle" in {before.kind, kind}:
        return tuple(lines)
    try:
        one, other = (m.parse(read_manifest(folder / m.FILE_NAME), folder) for folder in (old, path))
    except AdapterpackError as error:
        return (*lines, f"no closer look: {error.what}")
    return (*lines, *_in_manifests(one, other))


def _in_manifests(one: m.Manifest, other: m.Manifest) -> list[str]:
    lines = []
    if one.tensors != other.tensors:
        tensors = one.tensors.keys() | other.tensors.keys()
        differing = sum(one.tensors.get(name) != other.tensors.get(name) for name in tensors)
        lines.append(f"tensors: {differing} of {len(tensors)} differ")
    before, after = one.to_json(), other.to_json()
    for key in sorted(after):
        if key not in {"tensors", "files"} and before.get(key) != after[key]:
            short = [str(value[key])[:80] for value in (before, after)]
            lines.append(
                f"{key}: {short[0]} -> {short[1]}" if len("".join(short)) < 120 else f"{key} differs"
            )
    return lines
