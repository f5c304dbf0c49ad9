"""Reads JSON as the pack format allows it (no duplicate keys, no NaN, bounded depth and numbers), and writes
its canonical bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import FormatError
from ..library_errors import library_errors

MAX_DEPTH = 16
MAX_INTEGER = 2**53
MAX_PARTS = {"{": 200_000, "[": 200_000, ":": 400_000, ",": 1_000_000}
"""How often these may be in 16 MiB, in the texts that it holds, too: what they stand for takes many times
their bytes in memory.
"""


def loads(
    data: bytes, where: object, limit: int, max_integer: float = MAX_INTEGER, max_depth: int = MAX_DEPTH
) -> Any:
    """The value in ``data``, parsed strictly.

    Raises:
        FormatError: larger than ``limit`` bytes, of too many parts, not UTF-8, duplicate keys, NaN or
            Infinity, larger integers, ``-0``, half of a surrogate pair, or too deep.
    """
    if len(data) > limit:
        raise FormatError(
            "the JSON is too large", where=where, expected=f"at most {limit} bytes", found=len(data)
        )
    require_few_parts(data, where, limit)
    with library_errors(
        "json", "this is not valid JSON", where=where, remedy="fetch the file again from where it came"
    ):
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique(where),
            parse_constant=_no_constant(where),
            parse_int=_integer(where) if "-0" in text else None,
        )
    _check(value, where, max_depth, max_integer, "\\u" in text, max_depth)
    return value


def require_few_parts(data: bytes, where: object, limit: int) -> None:
    """Checks that JSON of at most ``limit`` bytes takes memory in proportion to it.

    Raises:
        FormatError: it has more parts than that.
    """
    for part, most in MAX_PARTS.items():
        if (count := data.count(part.encode())) > most * max(1, limit >> 24):
            raise FormatError(
                "the JSON has too many parts", where=where, expected=f"at most {most} of {part}", found=count
            )


def canonical(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, two-space indent, a newline at the end; the same on
    every machine.

    Structs and dataclasses are objects of their fields.

    Raises:
        FormatError: a value that JSON does not have, such as NaN or an array.

    Example:
        >>> print(canonical({"b": [1, 2.5], "a": {}}).decode(), end="")
        {
          "a": {},
          "b": [
            1,
            2.5
          ]
        }
    """
    try:
        text = json.dumps(
            value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_fields
        )
        # six times as fast as json with an indent
        return msgspec.json.format(text.encode("utf-8"), indent=2) + b"\n"
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"a value that JSON does not have: {error}", remedy="use plain numbers, text, lists and mappings"
        ) from error


def finite(value: Any) -> Any:
    """The value with null in place of NaN and infinity, which JSON does not have.

    Example:
        >>> finite({"error": [float("nan"), 1.5]})
        {'error': [None, 1.5]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> Any:
    """The value as reading it from JSON gives it back: structs and dataclasses are objects, tuples lists."""
    return json.loads(json.dumps(value, default=_fields))


def _fields(value: Any) -> dict[str, Any]:
    """The object of a struct or a dataclass, which the encoder does not know."""
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def digest(value: Any) -> str:
    """The sha256 of the canonical bytes, as hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def _unique(where: object) -> Any:
    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise FormatError("a key stands twice in one object", where=where, found=repr(twice)[:200])
        return result

    return hook


def _no_constant(where: object) -> Any:
    def hook(name: str) -> Any:
        raise FormatError("a number that JSON does not have", where=where, found=name)

    return hook


def _integer(where: object) -> Any:
    def hook(text: str) -> int:
        if text == "-0":  # other readers take it for a float
            raise FormatError("an integer that JSON readers do not agree on", where=where, found=text)
        return int(text)

    return hook


_HARMLESS = frozenset({str, bool, type(None)})


def _check(value: Any, where: object, depth: int, max_integer: float, escaped: bool, levels: int) -> None:
    """``escaped``: whether there is an escape at all, without which UTF-8 holds no half of a surrogate
    pair.
    """
    kind = type(value)
    if kind is str:
        if escaped and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise FormatError(
                "half of a surrogate pair, which is no character", where=where, found=repr(value)[:200]
            )
    elif kind is dict or kind is list:
        if depth <= 0:
            raise FormatError(
                "the JSON is nested too deeply", where=where, expected=f"at most {levels} levels"
            )
        if kind is dict and escaped:
            for key in value:
                _check(key, where, depth, max_integer, escaped, levels)
        for item in value.values() if kind is dict else value:
            if escaped or type(item) not in _HARMLESS:
                _check(item, where, depth - 1, max_integer, escaped, levels)
    elif kind is int and abs(value) > max_integer:
        most = "2^53" if max_integer == MAX_INTEGER else max_integer
        raise FormatError(
            "an integer is too large", where=where, expected=f"at most {most}", found=str(value)[:40]
        )
    elif kind is float and value in (float("inf"), float("-inf")):
        raise FormatError("a number too large for a double", where=where)
