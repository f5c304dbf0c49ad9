"""Reads local elliptic-curve keys from PEM files and uses them through ``cryptography``, which is imported
only here and only when needed.
"""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, StorageError, WronglySigned, storage_errors
from ...extras import needed_by
from ...paths import StrPath

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

MAX_KEY_BYTES = 1 << 16
_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""Curve -> the hash for its signatures; P-256 is the most common curve."""
_NEW_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem"
_PUBLIC_HALF = "openssl pkey -in key.pem -pubout -out key.pub"


def private_key(path: StrPath, password: str | None = None) -> EllipticCurvePrivateKey:
    """Reads the private key in a PEM file.

    Raises:
        ConfigError: the file has no usable private key, or the password is missing or wrong; the error shows
            nothing of the file's content.
        StorageError: the file cannot be read.
        MissingExtra: ``cryptography`` is not installed.
    """
    serialization = _crypto("serialization")
    data = _read(path)
    if b"PUBLIC KEY-----" in data:
        raise ConfigError(
            "this is a public key, and signing needs the private one",
            where=path,
            remedy=f"make a pair: {_NEW_KEY}",
        )
    try:
        key = serialization.load_pem_private_key(data, None if password is None else password.encode())
    except TypeError:  # raised if a password is missing, or given for a key without one
        mismatch = "a key with a password" if password is None else "a key without a password"
        raise ConfigError(
            "the private key and the password do not go together",
            where=path,
            found=mismatch,
            remedy="set ADAPTERPACK_KEY_PASSWORD for a key that has a password, and only then",
        ) from None
    except Exception:
        # The cause is not chained: whatever it quotes, nothing of a private key may reach a terminal or a
        # log.
        raise ConfigError(
            "the private key cannot be read",
            where=path,
            expected="a PEM file with an elliptic-curve key",
            remedy=f"check the password, or make a key: {_NEW_KEY}",
        ) from None
    return _of_known_curve(key, path)  # type: ignore[no-any-return]


def public_key(path: StrPath) -> EllipticCurvePublicKey:
    """Reads the public key in a PEM file.

    Raises:
        ConfigError: the file has no usable public key.
        StorageError: the file cannot be read.
        MissingExtra: ``cryptography`` is not installed.
    """
    serialization = _crypto("serialization")
    data = _read(path)
    if b"PRIVATE KEY-----" in data:
        raise ConfigError(
            "this is a private key, and verifying needs the public one",
            where=path,
            remedy=f"write it out: {_PUBLIC_HALF}",
        )
    try:
        key = serialization.load_pem_public_key(data)
    except Exception as error:
        raise ConfigError(
            "the public key cannot be read",
            where=path,
            expected="a PEM file with an elliptic-curve key",
            remedy=f"write it out from the private key: {_PUBLIC_HALF}",
        ) from error
    return _of_known_curve(key, path)  # type: ignore[no-any-return]


def key_digest(key: EllipticCurvePublicKey) -> str:
    """Returns the sha256 of the public key's PEM text, as hex, which names the key in signatures and
    reports.
    """
    serialization = _crypto("serialization")
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def sign_bytes(key: EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Returns the ECDSA signature of ``message``, DER-encoded."""
    return key.sign(message, _ecdsa(key))


def check_bytes(key: EllipticCurvePublicKey, signature: bytes, message: bytes, where: object) -> None:
    """Checks that ``signature`` is a signature of ``message`` with this key.

    Raises:
        WronglySigned: it is not.
    """
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - see the module

    try:
        key.verify(signature, message, _ecdsa(key))
    except InvalidSignature as error:
        raise WronglySigned(
            "the signature is not one of this key over what was signed",
            where=where,
            remedy="do not use the pack; fetch it again, or ask its maker for the right public key",
        ) from error


def _crypto(module: str) -> Any:
    with needed_by("signing"):
        return import_module(f"cryptography.hazmat.primitives.{module}")


def _ecdsa(key: EllipticCurvePrivateKey | EllipticCurvePublicKey) -> Any:
    return _crypto("asymmetric.ec").ECDSA(getattr(_crypto("hashes"), _HASHES[key.curve.name])())


def _of_known_curve(key: Any, where: object) -> Any:
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__.strip("_"))
    if curve not in _HASHES:
        raise ConfigError(
            "the key is of a kind that pack signatures do not use",
            where=where,
            expected=" or ".join(_HASHES),
            found=curve,
            remedy=f"make a key: {_NEW_KEY}",
        )
    return key


def _read(path: StrPath) -> bytes:
    if not Path(path).is_file():
        raise StorageError("there is no such key file", where=path, remedy=f"make a key: {_NEW_KEY}")
    with storage_errors(path), Path(path).open("rb") as file:
        data = file.read(MAX_KEY_BYTES + 1)
    if len(data) > MAX_KEY_BYTES:
        raise ConfigError(
            "the key file is too large to be a key", where=path, expected=f"at most {MAX_KEY_BYTES} bytes"
        )
    return data
