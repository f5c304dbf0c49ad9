"""Reads and writes the signed content: an in-toto statement that lists every file of a pack or a bundle with
its sha256, in the layout of OpenSSF model-signing.

Source: in-toto attestation framework, statement v1; model-signing predicate v1.0. The subject's digest is the
sha256 of the concatenated file digests, the predicate lists the files, and other verifiers ignore further
members of the predicate.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any

from ...errors import ConfigError, FormatError, UnsupportedSignature, WronglySigned
from ...io import strict_json
from .. import MUTABLE
from .dsse import MAX_BYTES

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
EXTENSION = "adapterpack"
MAX_IDENTITY = 256
_PART = "[A-Za-z0-9_.][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(rf"(?!\.\.?(/|$)){_PART}(/(?!\.\.?(/|$)){_PART}){{0,3}}")
_HEX = re.compile(r"[0-9a-f]{64}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Statement:
    """The signed content: the name, its files with their sha256 as hex, the signer's identity, and the expiry
    (UTC).
    """

    name: str
    files: Mapping[str, str]
    identity: str | None = None
    expires: datetime | None = None

    def to_bytes(self) -> bytes:
        """Returns the payload in its canonical form."""
        resources = [
            {"name": name, "algorithm": "sha256", "digest": self.files[name]} for name in sorted(self.files)
        ]
        return strict_json.canonical(
            {
                "_type": STATEMENT_TYPE,
                "subject": [
                    {
                        "name": self.name,
                        "digest": {"sha256": _root([self.files[name] for name in sorted(self.files)])},
                    }
                ],
                "predicateType": PREDICATE_TYPE,
                "predicate": {
                    "serialization": {
                        "method": "files",
                        "hash_type": "sha256",
                        "allow_symlinks": False,
                        "ignore_paths": sorted(MUTABLE),
                    },
                    "resources": resources,
                    EXTENSION: {
                        "identity": self.identity,
                        "expires": self.expires and format_moment(self.expires),
                    },
                },
            }
        )


def read(payload: bytes, where: object) -> Statement:
    """Parses the statement in a payload whose signature has been verified.

    Raises:
        UnsupportedSignature: files were hashed or listed in another way, or an unknown member might limit
            what was signed.
        WronglySigned: the payload is not a statement over the files of one folder.
    """
    try:
        value = strict_json.loads(payload, where, MAX_BYTES)
        if (value["_type"], value["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
            raise UnsupportedSignature(
                "the signed statement is of another type",
                where=where,
                expected=PREDICATE_TYPE,
                found=f"{value['_type']}, {value['predicateType']}"[:300],
                remedy="sign the pack again",
            )
        (subject,), predicate = value["subject"], value["predicate"]
        serialization, resources = predicate["serialization"], predicate["resources"]
        kinds = {
            serialization["method"],
            serialization["hash_type"],
            *(resource["algorithm"] for resource in resources),
        }
        if kinds != {"files", "sha256"}:
            raise UnsupportedSignature(
                "the files were signed in another way than by their sha256",
                where=where,
                expected="files, sha256",
                found=", ".join(sorted(map(str, kinds))),
                remedy="sign the pack again, by files and sha256",
            )
        files = {
            _matching(_NAME, resource["name"]): _matching(_HEX, resource["digest"]) for resource in resources
        }
        if len(files) != len(resources) or subject["digest"]["sha256"] != _root(
            [resource["digest"] for resource in resources]
        ):
            raise ValueError("the files do not add up to the subject's digest")
        extension = predicate.get(EXTENSION) or {}
        # An unknown member might restrict what was signed, so ignoring it would be unsafe.
        if extra := extension.keys() - {"identity", "expires"}:
            raise UnsupportedSignature(
                "the signature says something that this version does not understand",
                where=where,
                found=", ".join(sorted(extra))[:200],
                remedy="update adapterpack",
            )
        return Statement(
            _text(subject["name"]),
            files,
            _text(extension.get("identity"), None),
            _moment(extension.get("expires")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, FormatError) as error:
        raise WronglySigned(
            f"what was signed is not a statement over the files of one folder: {error}",
            where=where,
            remedy="sign the pack again",
        ) from error


def expiry(text: str) -> datetime:
    """Parses an expiry from the user: a date, which is included (in UTC), or a date and time with a time
    zone.

    Raises:
        ConfigError: the text is neither.

    Example:
        >>> format_moment(expiry("2030-06-30")), format_moment(expiry("2030-06-30T12:00:00+02:00"))
        ('2030-06-30T23:59:59Z', '2030-06-30T10:00:00Z')
    """
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            return datetime.combine(date.fromisoformat(text), time(23, 59, 59), UTC)
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        return moment.astimezone(UTC).replace(microsecond=0)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            "the expiry is not a date",
            expected="2030-06-30 or 2030-06-30T12:00:00Z",
            found=repr(text)[:100],
            remedy="write a date, or a time with its zone",
        ) from error


def format_moment(moment: datetime) -> str:
    """Formats a moment in UTC as signatures and reports write it."""
    return moment.astimezone(UTC).strftime(_TIME)


def _root(digests: list[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _matching(pattern: re.Pattern[str], text: Any) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise ValueError(f"{text!r} is neither a plain file name nor a sha256"[:200])
    return text


def _text(value: Any, default: Any = "") -> Any:
    if value is None and default is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_IDENTITY:
        raise ValueError(f"a name must be text of at most {MAX_IDENTITY} characters")
    return value


def _moment(value: Any) -> datetime | None:
    return None if value is None else datetime.strptime(value, _TIME).replace(tzinfo=UTC)
