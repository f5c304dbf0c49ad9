"""The digest that a manifest contains of itself, which detects bytes changed by a disk or a network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ..errors import FormatError
from ..io import strict_json

KEY = "integrity"
_BEFORE = b'\n  "integrity": "'
"""The bytes before the digest in canonical bytes, which occur nowhere else because JSON strings contain no
line breaks.
"""


def seal(value: Mapping[str, Any]) -> bytes:
    """Returns the canonical bytes of a manifest's fields with ``integrity``: the sha256 of these bytes with
    an empty digest.

    It detects accidental changes, on a disk or in transit. Anyone who changes a manifest on purpose can
    compute it again; signatures and pinned ids protect against that.
    """
    # The digest covers the canonical bytes with an empty digest, which is then filled in without changing
    # anything else.
    data = strict_json.canonical({**value, KEY: ""})
    end = data.index(_BEFORE) + len(_BEFORE)
    return data[:end] + hashlib.sha256(data).hexdigest().encode() + data[end:]


def digests_in(data: bytes) -> tuple[str, str]:
    """Returns the digest that canonical bytes should contain, and the digest that they do contain."""
    end = data.find(_BEFORE) + len(_BEFORE)
    said = data[end : end + 64]
    rest = data[end + 64 :]
    return hashlib.sha256(data[:end] + rest).hexdigest(), said.decode("utf-8", "replace")


def require_whole(value: Mapping[str, Any], data: bytes, where: object, remedy: str) -> None:
    """Checks that the manifest ``value`` in ``data`` contains the digest of these bytes.

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
