"""Parses the body of a request into the struct of its route; errors name the field at fault."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from ..errors import FormatError, nearest
from ..http.bodies import body_of, require_size
from ..http.http_error import HTTPError
from ..io import strict_json, typed_json
from ..io.typed_json import StrictStruct
from .tenants.limits import ServerLimits

T = TypeVar("T", bound=StrictStruct)
_CODES = {400: "invalid_request", 408: "request_too_slow", 413: "request_too_large"}
_LARGEST = 1 << 64
"""The bound of integers: seeds have 64 bits."""


async def body(request: Request, kind: type[T], limits: ServerLimits) -> T:
    """Reads and parses the body of a request.

    Raises:
        HTTPError: the body is no JSON object or does not fit the struct (400), too slow (408), too large
            (413), or of another media type (415).
    """
    kind_of_body = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind_of_body != "application/json":
        raise HTTPError(415, "unsupported_media_type", "the body is application/json", param="Content-Type")
    try:
        require_size(request, limits.body_bytes)
        data = await body_of(request, limits.body_seconds)
    except HTTPError as refused:
        raise HTTPError(refused.status, _CODES[refused.status], refused.what, close=True) from refused
    return parse(data, kind, limits)


def parse(data: bytes, kind: type[T], limits: ServerLimits) -> T:
    """Parses JSON bytes into a struct.

    Raises:
        HTTPError: the bytes are no JSON object, or do not fit the struct.
    """
    try:
        value = strict_json.loads(data, None, limits.body_bytes, _LARGEST, limits.depth)
    except FormatError as error:
        raise HTTPError(400, "invalid_json", error.sentence) from error
    if not isinstance(value, dict):
        raise HTTPError(400, "invalid_json", "the body is a JSON object")
    given = {name: item for name, item in value.items() if item is not None}
    _require_known(given, kind)
    try:
        struct: T = msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        pointer, message = typed_json.misfit(given, kind) or ("", str(error))
        raise _misfit(pointer, message) from error
    for pointer, message in struct.breaches():
        raise _misfit(pointer, message)
    return struct


def _require_known(given: dict[str, Any], kind: type[StrictStruct]) -> None:
    known = kind.__struct_encode_fields__
    for name in given:
        if name not in known:
            raise HTTPError(
                400,
                "unknown_parameter",
                f"this server has no such field: {name[:100]!r}; {nearest(name[:100], known)}",
                param=name[:100],
            )


def _misfit(pointer: str, message: str) -> HTTPError:
    place = pointer.removeprefix("/").replace("/", ".")
    return HTTPError(400, "invalid_request", f"{place}: {message}" if place else message, param=place or None)
