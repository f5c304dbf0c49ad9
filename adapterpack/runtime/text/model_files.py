"""Reads the small files that describe a model, as untrusted input: with limits of size, strict syntax, and
checked types.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...io import strict_json
from ...io.safe_open import read_file

MAX_JSON = 8 << 20
MAX_TEXT = 256 << 10
MAX_ID = (1 << 32) - 1


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file with one object; returns an empty one if there is no such file.

    Raises:
        FormatError: the file is too large, no strict JSON, or no object.
    """
    if not path.exists():
        return {}
    # tokenizers write 10^30 for "no limit"
    value = strict_json.loads(read_bytes(path, MAX_JSON), path, MAX_JSON, max_integer=float("inf"))
    if not isinstance(value, dict):
        raise FormatError(
            "the file holds no JSON object", where=path, expected="an object", found=type(value).__name__
        )
    return value


def read_bytes(path: Path, most: int) -> bytes:
    """Reads a file of at most ``most`` bytes.

    Raises:
        FormatError: the file has more.
    """
    data = read_file(path, most + 1)
    if len(data) > most:
        raise FormatError("the file is too large", where=path, expected=f"at most {most} bytes")
    return data


def read_text(path: Path) -> str:
    """Reads a small text in UTF-8.

    Raises:
        FormatError: the file is too large, or no UTF-8.
    """
    try:
        return read_bytes(path, MAX_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"the file is no text in UTF-8: {error}", where=path) from error


def token_ids(config: Mapping[str, Any], key: str, where: Path) -> tuple[int, ...]:
    """Returns the token ids under a key of a configuration, which may be one id, a list or missing.

    Raises:
        FormatError: the value is none of these.

    Example:
        >>> token_ids({"eos_token_id": [2, 5]}, "eos_token_id", Path("config.json"))
        (2, 5)
    """
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int and 0 <= one <= MAX_ID for one in ids):
        raise FormatError(
            "this is no token id",
            where=f"{where}#{key}",
            expected="a number from 0, or a list of them",
            found=repr(value)[:80],
        )
    return tuple(ids)
