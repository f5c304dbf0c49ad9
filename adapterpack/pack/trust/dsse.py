"""Reads and writes the signature file: a DSSE envelope in a sigstore bundle, signed with a local key
(signatures under an identity: keyless.py).

Source: DSSE 1.0 (secure-systems-lab/dsse, protocol and envelope) and sigstore bundle 0.3, as OpenSSF
model-signing 1.1 writes them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import FormatError, UnsupportedSignature, WronglySigned
from ...io import Json, strict_json
from .keys import check_bytes, key_digest, sign_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_BYTES = 1 << 20
_KEYS = {
    "": {"mediaType", "verificationMaterial", "dsseEnvelope"},
    "verificationMaterial": {"publicKey", "tlogEntries"},
    "publicKey": {"hint"},
    "dsseEnvelope": {"payload", "payloadType", "signatures"},
    "signatures": {"sig", "keyid"},
}
"""Object -> the keys that it must have; only ``tlogEntries`` and ``keyid`` are optional, because they mean
nothing for a local key.
"""
_OPTIONAL = {"tlogEntries", "keyid"}


class Sealed(NamedTuple):
    """What a signature file holds whose signature is right: the signed payload, the signer's key as the
    sha256 of its PEM text in hex, or that of the certificate, and whom the certificate names and who vouched
    for that.
    """

    payload: bytes
    key: str
    identity: str | None = None
    issuer: str | None = None


def pre_authentication(payload: bytes) -> bytes:
    """Returns the bytes to sign: DSSE's PAE of the payload and its type.

    Example:
        >>> pre_authentication(b"{}")
        b'DSSEv1 28 application/vnd.in-toto+json 2 {}'
    """
    return b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def seal(payload: bytes, key: EllipticCurvePrivateKey) -> bytes:
    """Returns the bytes of the signature file for ``payload``."""
    signature = sign_bytes(key, pre_authentication(payload))
    return strict_json.canonical(
        {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": key_digest(key.public_key())}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
    )


def unseal(data: bytes, key: EllipticCurvePublicKey, where: object) -> bytes:
    """Returns the payload of a signature file if it was signed with ``key``; the payload is not parsed.

    Raises:
        UnsupportedSignature: the signature rests on a certificate or a transparency log.
        WronglySigned: the file is malformed, signed with another key, or altered.
    """
    bundle, material = _parse(data, where)
    # Checked first, so that a valid signature of another kind is not reported as malformed.
    _only_local_keys(material, where)
    _object(bundle, "", where)
    material, envelope = (
        _object(bundle[name], name, where) for name in ("verificationMaterial", "dsseEnvelope")
    )
    hint = _object(material["publicKey"], "publicKey", where)["hint"]
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise _malformed("exactly one signature is due", where)
    signature = _object(signatures[0], "signatures", where)
    for name, stored, wanted in (
        ("mediaType", bundle["mediaType"], MEDIA_TYPE),
        ("payloadType", envelope["payloadType"], PAYLOAD_TYPE),
    ):
        if stored != wanted:
            raise _malformed(
                f"another {name} than that of a model signature", where, wanted, repr(stored)[:200]
            )
    digest = key_digest(key)
    if hint != digest or signature.get("keyid", "") not in {"", digest}:
        raise WronglySigned(
            "the pack was signed with another key",
            where=where,
            expected=f"key {digest[:16]}",
            found=f"key {str(hint)[:16]}",
            remedy="ask the maker of the pack for the public key; do not trust it before",
        )
    payload = _base64(envelope["payload"], where)
    check_bytes(key, _base64(signature["sig"], where), pre_authentication(payload), where)
    return payload


def require_certificate(data: bytes, where: object) -> None:
    """Checks that a signature file is JSON within limits, and rests on one certificate.

    Raises:
        UnsupportedSignature: it rests on something else.
        WronglySigned: it cannot be read.
    """
    _, material = _parse(data, where)
    if "certificate" not in material:
        raise UnsupportedSignature(
            "the signature is not one of an identity",
            where=where,
            expected="certificate",
            remedy="verify it with the signer's public key, or ask for a signature under an identity",
        )


def _parse(data: bytes, where: object) -> tuple[Any, Json]:
    """Returns the value in a signature file, and what there is to verify it, nothing where that is
    malformed.
    """
    try:
        bundle = strict_json.loads(data, where, MAX_BYTES)
    except FormatError as error:
        raise WronglySigned(
            f"the signature file cannot be read: {error.what}",
            where=where,
            found=error.found,
            remedy="fetch the pack again",
        ) from error
    material = bundle.get("verificationMaterial") if isinstance(bundle, dict) else None
    return bundle, material if isinstance(material, dict) else {}


def _only_local_keys(material: Mapping[str, Any], where: object) -> None:
    extra = sorted(name for name in material if name not in {"publicKey", "tlogEntries"} and material[name])
    if extra or material.get("tlogEntries"):
        raise UnsupportedSignature(
            "the signature rests on more than a local key",
            where=where,
            expected="publicKey",
            found=", ".join(extra or ["tlogEntries"]),
            remedy="verify it by identity and issuer (--issuer), or ask for a signature with a local key",
        )


def _object(value: Any, name: str, where: object) -> Json:
    wanted = _KEYS[name]
    if not isinstance(value, dict) or not wanted - _OPTIONAL <= value.keys() <= wanted:
        keys = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise _malformed(
            f"'{name or 'the bundle'}' is not what a signature has there",
            where,
            ", ".join(sorted(wanted)),
            repr(keys)[:200],
        )
    return value


def _base64(text: Any, where: object) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError) as error:
        raise _malformed("a part of the signature is not base64", where) from error
    # accepting only the canonical encoding leaves no bytes that could be changed unnoticed
    if not data or base64.b64encode(data).decode() != text:
        raise _malformed("a part of the signature is not base64 in its one form", where)
    return data


def _malformed(what: str, where: object, expected: object = None, found: object = None) -> WronglySigned:
    return WronglySigned(
        f"the signature file is malformed: {what}",
        where=where,
        expected=expected,
        found=found,
        remedy="fetch the pack again",
    )
