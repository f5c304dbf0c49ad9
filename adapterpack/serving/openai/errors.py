"""Errors in the form of OpenAI's API: ``{"error": {message, type, param, code}}`` with an HTTP status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from starlette.responses import Response

from ...errors import AdapterpackError, ConfigError, FormatError, UnknownAdapter, Unsupported
from ...http import HTTPError
from ...io import FrozenStruct
from ...slots import NotASum

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""HTTP status -> OpenAI's type of error. Others are ``invalid_request_error``, or ``server_error`` from 500
on.
"""
_FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "json_schema": "response_format",
    "regex": "guided_regex",
    "grammar": "guided_grammar",
}
"""Sampling parameter -> the request field from which it comes."""
_NAMED = (NotASum,)
"""Request errors with a code of their own; the others have ``invalid_request``."""
_OF_REQUESTS = (ConfigError, FormatError, Unsupported)
"""Errors that are the request's fault, if they arise while it is handled."""


class ErrorDetails(FrozenStruct):
    """An error: a sentence, its type, the field at fault, and a stable code for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(FrozenStruct):
    """The body of every error response."""

    error: ErrorDetails


def as_http_error(error: AdapterpackError) -> HTTPError:
    """Converts an error to its HTTP response. Details about this machine or other adapters are left out."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, UnknownAdapter):
        return HTTPError(404, "model_not_found", "there is no such model", param="model")
    if not isinstance(error, _OF_REQUESTS):
        return HTTPError(500, error.code, error.what)
    name = error.code.replace("-", "_") if isinstance(error, _NAMED) else "invalid_request"
    sides = [
        f"{name} {side}"
        for name, side in (("expected", error.expected), ("found", error.found))
        if side is not None
    ]
    where = error.where if error.where is not None and error.where.isidentifier() else None
    what = f"{error.what} ({', '.join(sides)})" if sides else error.what
    return HTTPError(400, name, what, param=None if where is None else _FIELDS.get(where, where))


def details(refused: HTTPError) -> ErrorAnswer:
    """Makes the body of an error response."""
    kind = TYPES.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
    return ErrorAnswer(ErrorDetails(refused.what, kind, refused.more.get("param"), refused.name))


class ErrorForm(NamedTuple):
    """How an API writes errors: the struct of the body, and a function that makes it."""

    struct: type
    of: Callable[[HTTPError], Any]


OPENAI = ErrorForm(ErrorAnswer, details)


def response(refused: HTTPError, form: ErrorForm = OPENAI) -> Response:
    """Makes the complete error response, with headers."""
    headers = (
        {"Retry-After": str(max(1, round(refused.more["retry_after"])))}
        if "retry_after" in refused.more
        else {}
    )
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.more.get("close"):
        headers["Connection"] = "close"
    return Response(msgspec.json.encode(form.of(refused)), refused.status, headers, "application/json")
