"""Pushes an artifact to an OCI registry: a raw layer for each file, as CNCF ModelPack 0.0.7 has it, and the
signature and the bill of materials attached to its manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import msgspec

from ..bill_of_materials import bill_of
from ..errors import ConfigError, FormatError, RepoNotFound
from ..io import Progress, strict_json
from ..pack import SIGNATURE
from ..pack.trust.dsse import MEDIA_TYPE as SIGNATURE_TYPE
from .prepare import PreparedPush
from .transport import LocalFile, RegistryReference, hub_errors, with_retries
from .transport.http import ErrorResponse, allowed_seconds
from .transport.registry import ARTIFACT, EMPTY, INDEX, MANIFEST, PATH, Descriptor, RegistryClient

BILL = "application/vnd.cyclonedx+json"
_LAYERS = {**dict.fromkeys((".json", ".txt", ".jinja"), "weight.config"), ".md": "doc"}
"""Suffix -> the kind of a layer; any other file holds weights."""
_FORMATS = {"pack": "safetensors", "bundle": "onnx"}


def push_to_registry(
    ours: PreparedPush,
    reference: RegistryReference,
    dry_run: bool,
    progress: Progress,
) -> tuple[str, tuple[str, ...]]:
    """Uploads what the registry lacks, sets the tag, and compares it with what was sent. Returns the digest
    of the OCI manifest and the files that were sent.

    Raises:
        ConfigError: the address names no tag.
        FormatError: what arrived is not what was sent.
        HubError: the registry refuses.
    """
    if ":" in reference.revision:
        raise ConfigError("a push goes to a tag", where=reference, remedy="name a tag, or none for 'latest'")
    files = dict(ours.files)
    signature = files.pop(SIGNATURE, None)
    layers = [
        _describe(
            file,
            f"application/vnd.cncf.model.{_LAYERS.get(PurePosixPath(path).suffix, 'weight')}.v1.raw",
            path,
        )
        for path, file in sorted(files.items())
    ]
    config = _json_file(
        {
            "descriptor": {"name": ours.label},
            "config": {"format": _FORMATS[ours.kind]},
            "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
        }
    )
    described = _describe(config, "application/vnd.cncf.model.config.v1+json")
    made = _manifest(ARTIFACT, described, layers)
    upload = _Upload(RegistryClient(reference), dry_run)
    sent = []
    done = 0
    total = sum(file.size for file in files.values())
    with hub_errors(reference):
        for path, file in files.items():
            if upload.blob(file):
                sent.append(path)
            done += file.size
            progress(done, total)
        upload.blob(config)
        if not dry_run:
            upload.manifest(reference.revision, made, MANIFEST)
            subject = _describe(made, MANIFEST)
            if signature is not None:
                upload.attach(subject, SIGNATURE_TYPE, signature, SIGNATURE)
            upload.attach(subject, BILL, _json_file(bill_of(ours.folder)), "bom.cdx.json")
            found, _ = upload.registry.manifest(reference.revision)
            if found != subject.digest:
                raise FormatError(
                    "what arrived at the registry is not what was sent",
                    where=reference,
                    expected=subject.digest,
                    found=found,
                    remedy="push again",
                )
    return f"sha256:{made.sha256}", tuple(sent)


class _Upload(NamedTuple):
    """What writes to a repository."""

    registry: RegistryClient
    dry_run: bool

    def blob(self, file: LocalFile) -> bool:
        """Uploads a file unless the registry has it, and returns whether it lacked it."""
        path = f"blobs/sha256:{file.sha256}"
        # a registry may send its clients elsewhere to look
        with suppress(RepoNotFound, ErrorResponse), self.registry.open("HEAD", path):
            return False
        if not self.dry_run:
            with_retries(lambda: self._put(file))
        return True

    def _put(self, file: LocalFile) -> None:
        with self.registry.open("POST", "blobs/uploads/", headers={"Content-Length": "0"}) as response:
            address = response.headers.get("Location", "")
        self._send(
            f"{address}{'&' if '?' in address else '?'}digest=sha256:{file.sha256}",
            file,
            "application/octet-stream",
        )

    def manifest(self, revision: str, file: LocalFile, kind: str) -> Mapping[str, str]:
        """Writes a manifest or an index, and returns the headers of the answer."""
        return with_retries(lambda: self._send(f"manifests/{revision}", file, kind))

    def _send(self, path: str, file: LocalFile, kind: str) -> Mapping[str, str]:
        with self.registry.open(
            "PUT",
            path,
            file,
            headers={"Content-Type": kind, "Content-Length": str(file.size)},
            seconds=allowed_seconds(file.size),
        ) as response:
            headers: Mapping[str, str] = response.headers
            return headers

    def attach(self, subject: Descriptor, kind: str, file: LocalFile, name: str) -> None:
        """Attaches a file to a manifest. A registry that does not list such files gets a list of them under
        the tag that the specification names.
        """
        empty = LocalFile.of(b"{}")
        for one in (empty, file):
            self.blob(one)
        config = _describe(empty, EMPTY)
        made = _manifest(kind, config, [_describe(file, kind, name)], subject)
        mine = _describe(made, MANIFEST, kind=kind)
        if "OCI-Subject" in self.manifest(mine.digest, made, MANIFEST):
            return
        others = [one for one in self.registry.referrers(subject.digest) if one.digest != mine.digest]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*others, mine]}
        self.manifest(subject.digest.replace(":", "-"), _json_file(index), INDEX)


def _json_file(value: Any) -> LocalFile:
    return LocalFile.of(strict_json.canonical(msgspec.to_builtins(value)))


def _describe(file: LocalFile, media_type: str, path: str = "", kind: str = "") -> Descriptor:
    names = {PATH: path, "org.opencontainers.image.title": path} if path else {}
    return Descriptor(media_type, f"sha256:{file.sha256}", file.size, kind, names)


def _manifest(
    kind: str, config: Descriptor, layers: list[Descriptor], subject: Descriptor | None = None
) -> LocalFile:
    made = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": kind,
        "config": config,
        "layers": layers,
    }
    return _json_file(made if subject is None else {**made, "subject": subject})
