"""The canonical text of JSON values, built in one pass: the standard encoder indents in pure Python, a generator for every level."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any

from .plain import plain


def text(value: Any) -> str:
    """What ``json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)`` gives, and its errors.

    Dataclasses are objects of their fields. Plain values are written here; whatever else there is, and every error, is left to the
    standard encoder.

    Raises:
        TypeError: a value that JSON does not have, or keys that have no order.
        ValueError: NaN, infinity, or a value that holds itself.

    Example:
        >>> print(text({"b": [1, 2.5], "a": {}}))
        {
          "a": {},
          "b": [
            1,
            2.5
          ]
        }
    """
    try:
        return _text(value, "\n")
    except (TypeError, RecursionError):
        return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False, default=_object)


def _text(value: Any, line: str) -> str:
    """``line`` is a line break and the indent of what stands around."""
    kind = type(value)
    if kind is str:
        return encode_basestring(value)
    inner = line + "  "
    if kind is dict:
        entries = [f"{encode_basestring(key)}: {_text(value[key], inner)}" for key in sorted(value)]
        return f"{{{inner}{f',{inner}'.join(entries)}{line}}}" if entries else "{}"
    if kind is list or kind is tuple:
        items = [_text(item, inner) for item in value]
        return f"[{inner}{f',{inner}'.join(items)}{line}]" if items else "[]"
    if kind is int or (kind is float and math.isfinite(value)):
        return repr(value)
    if value is None or kind is bool:
        return _CONSTANTS[value]
    if names := _fields(kind):  # type: ignore[arg-type]
        entries = [f"{key}{_text(getattr(value, name), inner)}" for key, name in names]
        return f"{{{inner}{f',{inner}'.join(entries)}{line}}}"
    raise TypeError(kind)  # for the standard encoder


def _object(value: Any) -> Any:
    """The object of a dataclass, which the standard encoder does not know."""
    if not _fields(type(value)):  # type: ignore[arg-type]
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return plain(value)


@lru_cache(maxsize=256)
def _fields(kind: type) -> tuple[tuple[str, str], ...]:
    """The fields of a dataclass in the order of their names, each with the text that stands before its value."""
    names = sorted(each.name for each in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else []
    return tuple((f"{encode_basestring(name)}: ", name) for name in names)


_CONSTANTS = {None: "null", True: "true", False: "false"}
