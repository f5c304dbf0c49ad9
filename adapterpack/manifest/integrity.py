"""The digest that a manifest holds of itself: a byte that a disk or a network changed is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ..errors import FormatError
from ..io import strict_json

KEY = "integrity"
SCHEMA = {
    "description": "The sha256 of the manifest's own bytes with this text empty.",
    "type": "string",
    "pattern": "^[0-9a-f]{64}$",
}
"""What the schemas of manifests say of that field."""
_BEFORE = b'\n  "integrity": "'
"""What stands before the digest in canonical bytes, and nowhere else: a text holds no line break."""


def seal(value: Mapping[str, Any]) -> bytes:
    """The canonical bytes of a manifest's fields, with ``integrity``: the sha256 of these very bytes without
    that digest in them.

    It says that no byte was changed by accident, on a disk or on the way. Whoever changes a manifest on
    purpose can make it anew: that is what signatures and pinned ids are for.
    """
    data = strict_json.canonical({**value, KEY: ""})
    end = data.index(_BEFORE) + len(_BEFORE)
    return data[:end] + hashlib.sha256(data).hexdigest().encode() + data[end:]


def digests_in(data: bytes) -> tuple[str, str]:
    """The digest that canonical bytes must hold of themselves, and the one that they do."""
    end = data.find(_BEFORE) + len(_BEFORE)
    said, rest = data[end : end + 64], data[end + 64 :]
    return hashlib.sha256(data[:end] + rest).hexdigest(), said.decode("utf-8", "replace")


def require_whole(value: Mapping[str, Any], data: bytes, where: object, remedy: str) -> None:
    """Goes on only if the manifest ``value`` in ``data`` holds the digest of these bytes.

    Raises:
        FormatError: a byte was changed.
    """
    right, said = digests_in(data)
    if right != said or said != value.get(KEY):
        raise FormatError(
            "the manifest is not the one that was written: a byte of it was changed",
            where=f"{where}#/{KEY}",
            expected=right,
            found=said[:64],
            remedy=remedy,
        )
