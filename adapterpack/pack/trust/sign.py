"""Signs packs, fleets and bundles, and verifies signatures. A signature says who vouches for exactly which
bytes, and nothing about what they do.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from ...errors import (
    ConfigError,
    FormatError,
    OutputExists,
    SignatureExpired,
    StorageError,
    Unsigned,
    UnsupportedSignature,
    WronglySigned,
    storage_errors,
)
from ...io import Json, output_file, read_file, sha256_of
from ...manifest import manifest as m
from ...paths import StrPath
from .. import MUTABLE, SIGNATURE, Pack, require_unrevoked
from ..validate import load
from ..validate.checks import Finding, entries, regular_files
from . import dsse, statement
from .keyless import SigstoreIdentity, SigstoreSigner
from .keys import key_digest, private_key, public_key

FILE_NAME = SIGNATURE


@dataclass(frozen=True)
class Signature:
    """A valid signature: the signed pack and files (name -> ``sha256:`` and hex), the key or, without one,
    the certificate, the signer's identity, who vouched for it, and the expiry (UTC).

    ``load(path).id == signature.pack`` ties what is loaded to what was signed; for a fleet or a bundle
    ``pack`` is the sha256 of its manifest.
    """

    path: Path
    name: str
    pack: str
    key: str
    identity: str | None
    issuer: str | None
    expires: datetime | None
    files: Mapping[str, str]

    def to_json(self) -> Json:
        """Returns the signature as ``sign --json`` and ``verify --json`` print it."""
        return {
            "path": str(self.path),
            "name": self.name,
            "pack": self.pack,
            "signature": str(self.path / FILE_NAME),
            "key": self.key,
            "identity": self.identity,
            "issuer": self.issuer,
            "expires": self.expires and statement.format_moment(self.expires),
            "files": dict(self.files),
        }


class Signable(NamedTuple):
    """A folder whose manifest lists its files; ``kind`` is pack, fleet or bundle.

    ``free`` are the files that no signature covers, ``irregular`` finds links and pipes, ``present`` returns
    the files in the folder, and ``listed`` returns the files that a manifest with these bytes lists.
    """

    kind: str
    folder: Path
    manifest: str
    free: frozenset[str]
    irregular: Callable[[], Iterator[Finding]]
    present: Callable[[], set[str]]
    listed: Callable[[bytes], set[str]]


def sign(
    pack: Pack | StrPath,
    key: StrPath | SigstoreSigner,
    *,
    identity: str | None = None,
    expires: str | datetime | None = None,
    password: str | None = None,
) -> Signature:
    """Signs a pack; :func:`adapterpack.sign` documents the arguments."""
    folder = _folder(pack)
    if not (folder / m.FILE_NAME).is_file():
        raise FormatError(
            "only a pack with a manifest can be signed",
            where=folder,
            expected=m.FILE_NAME,
            remedy="load the folder and write it as a pack first",
        )

    def checked() -> statement.Statement:
        loaded = load(folder)  # what is signed is what was checked
        if isinstance(pack, Pack) and loaded.id != pack.id:
            raise FormatError(
                "the folder of the pack holds another pack now",
                where=folder,
                expected=pack.id,
                found=loaded.id,
                remedy="write the pack to a new folder and sign that",
            )
        files = {
            m.FILE_NAME: loaded.id.removeprefix("sha256:"),
            **{entry.path: entry.sha256 for entry in loaded.manifest.files},
        }
        return statement.Statement(loaded.name, files)

    return seal(_signable(folder), checked, key, identity, expires, password)


def seal(
    artifact: Signable,
    checked: Callable[[], statement.Statement],
    key: StrPath | SigstoreSigner,
    identity: str | None,
    expires: str | datetime | None,
    password: str | None,
) -> Signature:
    """Writes the signature of an artifact over the statement that ``checked`` returns after checking the
    artifact.

    Raises:
        ConfigError: the identity or the expiry is invalid.
        OutputExists: the artifact is already signed.
    """
    folder = artifact.folder
    kind = artifact.kind
    signer = _signer_of(key, password)
    moment = statement.expiry(expires) if isinstance(expires, str) else expires
    if moment is not None and (moment.tzinfo is None or moment <= datetime.now(UTC)):
        raise ConfigError(
            "the expiry has no time zone, or is in the past", found=moment, remedy="name a later date"
        )
    named = isinstance(key, SigstoreSigner)  # by the token
    if identity is not None and (named or not 0 < len(identity) <= statement.MAX_IDENTITY):
        raise ConfigError(
            "the identity cannot be used",
            expected=f"1 to {statement.MAX_IDENTITY} characters, and none beside an identity token",
            found=len(identity),
        )
    if os.path.lexists(folder / FILE_NAME):
        raise OutputExists(
            f"the {kind} has a signature already",
            where=folder / FILE_NAME,
            remedy="remove it first to sign again",
        )
    made = dataclasses.replace(checked(), identity=identity, expires=moment)
    data, sealed = signer(made.to_bytes())
    signature = _signature(artifact, made, sealed)
    with output_file(folder / FILE_NAME) as path:
        path.write_bytes(data)
    return signature


def verify(
    pack: Pack | StrPath,
    key: StrPath | SigstoreIdentity,
    *,
    identity: str | None = None,
    at: datetime | None = None,
) -> Signature:
    """Verifies the signature of a pack; :func:`adapterpack.verify` documents the arguments."""
    verified = unseal(_signable(_folder(pack)), key, identity, at)
    if isinstance(pack, Pack) and verified.pack != pack.id:
        raise WronglySigned(
            "the signature is of another pack",
            where=verified.path / FILE_NAME,
            expected=pack.id,
            found=verified.pack,
        )
    return verified


def unseal(
    artifact: Signable,
    key: StrPath | SigstoreIdentity,
    identity: str | None = None,
    at: datetime | None = None,
) -> Signature:
    """Returns the signature of an artifact, if the holder of the key, or the one with the identity, signed
    exactly the files in the folder.

    Raises:
        Unsigned, WronglySigned, SignatureExpired, Revoked, UnsupportedSignature: as for :func:`verify`.
    """
    kind = artifact.kind
    file = artifact.folder / FILE_NAME
    verifier = _verifier_of(key)
    if not os.path.lexists(file):
        raise Unsigned(
            f"the {kind} is not signed",
            where=artifact.folder,
            expected=FILE_NAME,
            remedy="ask its maker to sign it, or do not trust it",
        )
    # checked before any file is opened, so that no link leads outside and no pipe blocks
    if (irregular := next(artifact.irregular(), None)) is not None:
        raise WronglySigned(irregular.message, where=artifact.folder / irregular.where, remedy=irregular.fix)
    sealed = verifier(read_file(file, dsse.MAX_BYTES + 1), file)
    signed = statement.read(sealed.payload, file)
    require_unrevoked({f"sha256:{sealed.key}": "the key of the signature"}, file)
    _require_same_files(artifact, signed)
    signature = _signature(artifact, signed, sealed)
    if identity is not None and signature.identity != identity:
        raise WronglySigned(
            f"the {kind} was signed under another identity",
            where=file,
            expected=repr(identity),
            found=repr(signature.identity),
            remedy=f"ask the maker of the {kind}",
        )
    if signed.expires is not None and (at or datetime.now(UTC)) > signed.expires:
        raise SignatureExpired(
            "the signature is right, but it has expired",
            where=file,
            expected="a later expiry",
            found=statement.format_moment(signed.expires),
            remedy=f"ask the maker of the {kind} to sign it again",
        )
    return signature


def _signer_of(
    key: StrPath | SigstoreSigner, password: str | None
) -> Callable[[bytes], tuple[bytes, dsse.Sealed]]:
    """Returns what signs a payload, with the private key in a PEM file or under an identity: it returns the
    bytes of the signature file, and what they hold.
    """
    if isinstance(key, SigstoreSigner):
        return key.seal
    private = private_key(key, password)
    digest = key_digest(private.public_key())
    return lambda payload: (dsse.seal(payload, private), dsse.Sealed(payload, digest))


def _verifier_of(key: StrPath | SigstoreIdentity) -> Callable[[bytes, object], dsse.Sealed]:
    """Returns what verifies the bytes of a signature file for a trusted signer: a public key in a PEM file,
    or an identity. It takes the bytes and the place that errors name.
    """
    if isinstance(key, SigstoreIdentity):
        return key.unseal
    public = public_key(key)
    return lambda data, where: dsse.Sealed(dsse.unseal(data, public, where), key_digest(public))


def _signable(folder: Path) -> Signable:
    return Signable(
        "pack",
        folder,
        m.FILE_NAME,
        MUTABLE,
        lambda: regular_files(folder),
        lambda: {path.name for path in entries(folder)},
        lambda data: {entry.path for entry in m.parse(data, folder / m.FILE_NAME).files},
    )


def _require_same_files(artifact: Signable, signed: statement.Statement) -> None:
    """Checks that every signed file is present with the signed bytes, that every other file is allowed, and
    that the signature covers everything in the manifest.
    """
    kind, folder, manifest = artifact.kind, artifact.folder, artifact.manifest
    fetch = f"do not use the {kind}; fetch it again"
    present = artifact.present()
    for name in sorted(present - signed.files.keys() - artifact.free):
        raise WronglySigned(
            f"a file that was not signed lies in the {kind}",
            where=folder / name,
            remedy=f"remove it, or fetch the {kind} again",
        )
    for name in sorted(signed.files):
        if name not in present:
            raise WronglySigned("a signed file is missing", where=folder / name, remedy=fetch)
        with storage_errors(folder / name):
            digest = sha256_of(folder / name)
        if digest != signed.files[name]:
            raise WronglySigned(
                "a file was altered after signing",
                where=folder / name,
                expected=signed.files[name],
                found=digest,
                remedy=fetch,
            )
    if manifest not in signed.files:
        raise WronglySigned(
            "the signature does not cover the manifest",
            where=folder,
            expected=manifest,
            remedy=f"sign the {kind} again",
        )
    with storage_errors(folder / manifest):
        listed = {manifest, *artifact.listed((folder / manifest).read_bytes())}
    for name in sorted((listed ^ signed.files.keys()) - artifact.free):
        which = (
            "that the manifest lists was not signed"
            if name in listed
            else "was signed that the manifest does not list"
        )
        raise WronglySigned(f"a file {which}", where=folder / name, remedy=f"sign the {kind} again")


def _signature(artifact: Signable, signed: statement.Statement, sealed: dsse.Sealed) -> Signature:
    files = {name: f"sha256:{signed.files[name]}" for name in sorted(signed.files)}
    return Signature(
        artifact.folder,
        signed.name,
        files[artifact.manifest],
        f"sha256:{sealed.key}",
        sealed.identity or signed.identity,
        sealed.issuer,
        signed.expires,
        files,
    )


def _folder(pack: Pack | StrPath) -> Path:
    where = pack.path if isinstance(pack, Pack) else Path(pack)
    if where is None or not where.is_dir():
        raise StorageError(
            "there is no such pack folder",
            where=where or pack.where if isinstance(pack, Pack) else where,
            remedy="write the pack first, and name its folder",
        )
    return where


class Signers:
    """Who is trusted to sign packs, by public keys in PEM files and by identities; without any, packs need no
    signature.

    Raises:
        ConfigError, StorageError: a file contains no public key.
    """

    def __init__(self, keys: Sequence[StrPath | SigstoreIdentity] = ()) -> None:
        self._keys = tuple(keys)
        for key in self._keys:
            _verifier_of(key)

    def require(self, pack: Pack) -> None:
        """Checks that someone trusted signed this pack, or the fleet that it was taken from.

        Raises:
            TrustError: none of them signed it, or the signature has expired.
        """
        for number, key in enumerate(self._keys, 1):
            try:
                if pack.vouched is None:
                    verify(pack, key)
                else:
                    pack.vouched(key)
                return
            except (WronglySigned, UnsupportedSignature):
                if number == len(self._keys):
                    raise
