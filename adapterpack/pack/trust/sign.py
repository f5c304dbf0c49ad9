"""Detached signatures: who vouches for a pack, and for exactly which bytes. They say nothing about what the pack does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FormatError, OutputExists, SignatureExpired, StorageError, Unsigned, WronglySigned, storage_errors
from ...io.atomic import output_file
from ...io.hashing import sha256_of
from ...manifest import manifest as m
from ..pack import MUTABLE, SIGNATURE, Pack
from ..validate.checks.folder import entries, regular_files
from ..validate.validation import load
from . import dsse, statement
from .keys import key_digest, private_key, public_key

FILE_NAME = SIGNATURE


@dataclass(frozen=True)
class Signature:
    """A signature that holds: over which pack and files (name -> ``sha256:`` and hex), with which key, by whom, until when (UTC).

    ``load(path).id == signature.pack`` ties what is loaded to what was signed.
    """

    path: Path
    name: str
    pack: str
    key: str
    identity: str | None
    expires: datetime | None
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The signature as ``sign --json`` and ``verify --json`` print it."""
        return {
            "path": str(self.path),
            "name": self.name,
            "pack": self.pack,
            "signature": str(self.path / FILE_NAME),
            "key": self.key,
            "identity": self.identity,
            "expires": self.expires and statement.written(self.expires),
            "files": dict(self.files),
        }


def sign(
    pack: Pack | str | os.PathLike[str],
    key: str | os.PathLike[str],
    *,
    identity: str | None = None,
    expires: str | datetime | None = None,
    password: str | None = None,
) -> Signature:
    """Signs a pack: writes the detached signature ``adapterpack.sig.json`` into its folder, over the manifest and every file that it lists.

    ``key`` is a PEM file with a private elliptic-curve key, made with
    ``openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem``. ``identity`` is free text and ``expires`` a date or a
    time; both are signed too. OpenSSF's model-signing verifies the result.

    Raises:
        ConfigError: the key, the password or the expiry cannot be used.
        FormatError: not a valid pack, or a PEFT folder, which has no closed list of files.
        OutputExists: there is a signature already.
        Unsupported: ``cryptography`` is not installed.

    Example:
        >>> sign("packs/tickets", "key.pem", expires="2030-06-30").pack  # doctest: +SKIP
        'sha256:0f1c...'
    """
    folder = _folder(pack)
    signer = private_key(key, password)
    moment = statement.expiry(expires) if isinstance(expires, str) else expires
    if moment is not None and (moment.tzinfo is None or moment <= datetime.now(UTC)):
        raise ConfigError("the expiry has no time zone, or is over already", found=moment, remedy="name a later date")
    if identity is not None and not 0 < len(identity) <= statement.MAX_IDENTITY:
        raise ConfigError("the identity cannot be used", expected=f"1 to {statement.MAX_IDENTITY} characters", found=len(identity))
    if not (folder / m.FILE_NAME).is_file():
        raise FormatError("only a pack with a manifest can be signed", where=folder, expected=m.FILE_NAME,
                          remedy="load the folder and write it as a pack first")
    if os.path.lexists(folder / FILE_NAME):
        raise OutputExists("the pack has a signature already", where=folder / FILE_NAME, remedy="remove it first to sign again")
    loaded = load(folder)  # what is signed is what was checked
    if isinstance(pack, Pack) and loaded.id != pack.id:
        raise FormatError("the folder of the pack holds another pack now", where=folder, expected=pack.id, found=loaded.id,
                          remedy="write the pack to a new folder and sign that")
    files = {m.FILE_NAME: loaded.id.removeprefix("sha256:"), **{entry.path: entry.sha256 for entry in loaded.manifest.files}}
    made = statement.Statement(loaded.name, files, identity, moment)
    with output_file(folder / FILE_NAME) as path:
        path.write_bytes(dsse.seal(made.to_bytes(), signer))
    return _signature(folder, made, key_digest(signer.public_key()))


def verify(
    pack: Pack | str | os.PathLike[str],
    key: str | os.PathLike[str],
    *,
    identity: str | None = None,
    at: datetime | None = None,
) -> Signature:
    """Verifies a pack's signature: that the holder of the key signed exactly the files that lie there.

    ``key`` is a PEM file with the public key (``openssl pkey -in key.pem -pubout -out key.pub``). With ``identity``, the signed text must
    be that. ``at`` is the moment that the expiry is compared with: now, if none is given. Signatures that OpenSSF's model-signing made with
    a local key are verified too. Nothing but the envelope is parsed before its signature is known to be right.

    Raises:
        Unsigned: there is no signature.
        WronglySigned: another key, an altered envelope, or a file that was altered, added or removed after signing; it is named.
        SignatureExpired: everything is right, but its time is over.
        UnsupportedSignature: a signature that rests on more than a local key.
        ConfigError: the key cannot be used.
        Unsupported: ``cryptography`` is not installed.

    Example:
        >>> verify("packs/tickets", "key.pub").identity  # doctest: +SKIP
        'adapters@example.org'
    """
    folder, checker = _folder(pack), public_key(key)
    file = folder / FILE_NAME
    if not os.path.lexists(file):
        raise Unsigned("the pack is not signed", where=folder, expected=FILE_NAME, remedy="ask its maker to sign it, or do not trust it")
    irregular = next(regular_files(folder), None)  # before any file is opened: no link leads out, no pipe blocks
    if irregular is not None:
        raise WronglySigned(irregular.message, where=folder / irregular.where, remedy=irregular.fix)
    with storage_errors(file), file.open("rb") as stream:
        data = stream.read(dsse.MAX_BYTES + 1)
    signed = statement.read(dsse.unseal(data, checker, file), file)
    _require_same_files(folder, signed)
    signature = _signature(folder, signed, key_digest(checker))
    if isinstance(pack, Pack) and signature.pack != pack.id:
        raise WronglySigned("the signature is of another pack", where=file, expected=pack.id, found=signature.pack)
    if identity is not None and signed.identity != identity:
        raise WronglySigned("the pack was signed under another identity", where=file, expected=repr(identity),
                            found=repr(signed.identity), remedy="ask the maker of the pack")
    if signed.expires is not None and (at or datetime.now(UTC)) > signed.expires:
        raise SignatureExpired("the signature is right, but its time is over", where=file, expected="a later expiry",
                               found=statement.written(signed.expires), remedy="ask the maker of the pack to sign it again")
    return signature


def _require_same_files(folder: Path, signed: statement.Statement) -> None:
    """Every signed file is there with the signed bytes, every other file is one that may be added, and the manifest is covered whole."""
    fetch = "do not use the pack; fetch it again"
    present = {path.name for path in entries(folder)}
    for name in sorted(present - signed.files.keys() - MUTABLE):
        raise WronglySigned("a file that was not signed lies in the pack", where=folder / name, remedy="remove it, or fetch the pack again")
    for name in sorted(signed.files):
        if name not in present:
            raise WronglySigned("a signed file is missing", where=folder / name, remedy=fetch)
        with storage_errors(folder / name):
            digest = sha256_of(folder / name)
        if digest != signed.files[name]:
            raise WronglySigned("a file was altered after signing", where=folder / name, expected=signed.files[name], found=digest,
                                remedy=fetch)
    if m.FILE_NAME not in signed.files:
        raise WronglySigned("the signature does not cover the manifest", where=folder, expected=m.FILE_NAME, remedy="sign the pack again")
    with storage_errors(folder / m.FILE_NAME):
        manifest = m.parse((folder / m.FILE_NAME).read_bytes(), folder / m.FILE_NAME)
    listed = {m.FILE_NAME, *(entry.path for entry in manifest.files)}
    for name in sorted((listed ^ signed.files.keys()) - MUTABLE):
        which = "that the manifest lists was not signed" if name in listed else "was signed that the manifest does not list"
        raise WronglySigned(f"a file {which}", where=folder / name, remedy="sign the pack again")


def _signature(folder: Path, signed: statement.Statement, key: str) -> Signature:
    files = {name: f"sha256:{signed.files[name]}" for name in sorted(signed.files)}
    return Signature(folder, signed.name, files[m.FILE_NAME], f"sha256:{key}", signed.identity, signed.expires, files)


def _folder(pack: Pack | str | os.PathLike[str]) -> Path:
    where = pack.path if isinstance(pack, Pack) else Path(pack)
    if where is None or not where.is_dir():
        raise StorageError("there is no such pack folder", where=where or f"pack '{pack.name}'" if isinstance(pack, Pack) else where,
                           remedy="write the pack first, and name its folder")
    return where
