"""The types of a manifest's strings and numbers with their limits, and the limits of values whose type a
method or a vendor chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from msgspec import Meta

from ..io.typed_json import Misfit, escape_key

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""Pattern of valid pack names."""
PackName = Annotated[str, Meta(pattern=rf"^{NAME}\Z")]
Path = Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
"""The name of a module, a tensor or a parameter."""
Line = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
ShortText = Annotated[str, Meta(max_length=200)]
Repo = Annotated[str, Meta(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*\Z")]
Commit = Annotated[str, Meta(pattern=r"^[0-9a-f]{40}\Z")]
Identifier = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}\Z")]
Architecture = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}\Z")]
Hex = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
Fingerprint = Annotated[str, Meta(pattern=r"^bfp1:[0-9a-f]{64}\Z")]

SpecVersion = Annotated[int, Meta(ge=1, le=10_000)]
Width = Annotated[int, Meta(ge=1, le=1 << 24)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
TokenIds = Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=512)]
Number = Annotated[float, Meta(ge=-1e38, le=1e38)]
Positive = Annotated[float, Meta(ge=0, le=1e38)]

MAX_TEXT, MAX_ITEMS, MAX_KEYS = 1 << 20, 1 << 18, 1 << 16
LARGEST_SETTING, LARGEST_CLAIM = 1e38, 1.7976931348623157e308
Key = Annotated[str, Meta(max_length=512)]
"""The name of a setting or a claim."""
OF_SETTINGS, OF_CLAIMS = (
    {"additionalProperties": {"$ref": f"#/$defs/{name}"}} for name in ("setting", "claim")
)
Settings = Annotated[Mapping[Key, Any], Meta(max_length=64, extra_json_schema=OF_SETTINGS)]
Claims = Annotated[Mapping[Key, Any], Meta(max_length=64, extra_json_schema=OF_CLAIMS)]


def too_large(value: Any, pointer: str, largest: float) -> Iterator[Misfit]:
    """Yields the strings, lists, objects and numbers (beyond ``largest``) that are too large in an arbitrary
    JSON value.
    """
    kind = type(value)
    if kind is str:
        if len(value) > MAX_TEXT:
            yield Misfit(pointer, f"a text of {len(value)} characters is longer than {MAX_TEXT}")
    elif kind is int or kind is float:
        if abs(value) > largest:
            yield Misfit(pointer, f"expected a number up to {largest} in size, found {value!r:.40}")
    elif kind is list:
        if len(value) > MAX_ITEMS:
            yield Misfit(pointer, f"{len(value)} items are more than {MAX_ITEMS}")
        for number, item in enumerate(value):
            yield from too_large(item, f"{pointer}/{number}", largest)
    elif kind is dict:
        if len(value) > MAX_KEYS:
            yield Misfit(pointer, f"{len(value)} fields are more than {MAX_KEYS}")
        for key, item in value.items():
            if len(key) > 512:
                yield Misfit(pointer, f"{key!r:.100} is no name that a field can have here")
            yield from too_large(item, f"{pointer}/{escape_key(key)}", largest)
