"""Signs bundles and verifies their signatures, in the format of pack signatures."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from ...bundle import FILE_NAME, irregular, manifest_bytes, parse_bundle, present
from ...errors import FormatError
from ...io import sha256_of
from ...pack import SIGNATURE, Signature
from ...pack.trust.keyless import SigstoreIdentity, SigstoreSigner
from ...pack.trust.sign import Signable, seal, unseal
from ...pack.trust.statement import Statement
from ...pack.validate.checks import Finding
from ...paths import StrPath
from .validation import IRREGULAR, validate_bundle


def sign_bundle(
    folder: Path,
    key: StrPath | SigstoreSigner,
    *,
    identity: str | None,
    expires: str | datetime | None,
    password: str | None,
) -> Signature:
    """Validates a bundle and writes ``adapterpack.sig.json`` into it, which covers its manifest and every
    file that the manifest lists. The arguments are those of :func:`adapterpack.sign`.

    Raises:
        FormatError: the bundle is not valid.
    """

    def checked() -> Statement:
        report = validate_bundle(folder)
        report.require_valid()
        if report.incomplete:
            raise FormatError(
                "the bundle could not be checked to the end",
                where=folder,
                found="; ".join(report.not_checked),
            )
        bundle = parse_bundle(manifest_bytes(folder), folder / FILE_NAME)
        files = {
            FILE_NAME: sha256_of(folder / FILE_NAME),
            **{entry.path: entry.sha256 for entry in bundle.files},
        }
        return Statement(folder.resolve().name, files)

    return seal(_signable(folder), checked, key, identity, expires, password)


def verify_bundle(
    folder: Path, key: StrPath | SigstoreIdentity, *, identity: str | None, at: datetime | None
) -> Signature:
    """Returns the signature of a bundle if the trusted signer signed exactly the files in the folder. The
    arguments are those of :func:`adapterpack.verify`.
    """
    return unseal(_signable(folder), key, identity, at)


def _signable(folder: Path) -> Signable:
    def links() -> Iterator[Finding]:
        return (IRREGULAR._replace(where=path) for path in irregular(folder))

    def listed(manifest: bytes) -> set[str]:
        return {entry.path for entry in parse_bundle(manifest, folder / FILE_NAME).files}

    return Signable(
        "bundle", folder, FILE_NAME, frozenset({SIGNATURE}), links, lambda: present(folder), listed
    )
