"""Errors as OpenAI's clients know them: ``{"error": {message, type, param, code}}`` with a status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from starlette.responses import Response

from ...errors import AdapterpackError, ConfigError, FormatError, UnknownAdapter, Unsupported
from ...http.http_error import HTTPError
from ...slots.sums import NotASum

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""What OpenAI calls the kind of error of a status; others are an invalid request, or the server's own error
from 500 on.
"""
_FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "json_schema": "response_format",
    "regex": "guided_regex",
    "grammar": "guided_grammar",
}
"""Sampling parameters -> the fields that they come from."""
_NAMED = (NotASum,)
"""Those of them that programs can tell from others by their codes."""
_OF_REQUESTS = (ConfigError, FormatError, Unsupported)
"""Errors that a request is to blame for, when they arise from working on it."""


class ErrorDetails(msgspec.Struct, frozen=True):
    """What went wrong: a sentence, its kind, the field at fault, and a name that programs can rely on."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer that is an error."""

    error: ErrorDetails


def as_http_error(error: AdapterpackError) -> HTTPError:
    """The refusal that an error becomes. What it says of this machine and of other adapters stays here."""
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
    """The body of a refusal."""
    kind = TYPES.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
    return ErrorAnswer(ErrorDetails(refused.what, kind, refused.more.get("param"), refused.name))


class ErrorForm(NamedTuple):
    """How an API writes errors: the struct of a body, and that of a refusal."""

    struct: type[Any]
    of: Callable[[HTTPError], Any]


OPENAI = ErrorForm(ErrorAnswer, details)


def response(refused: HTTPError, form: ErrorForm = OPENAI) -> Response:
    """The whole answer of a refusal."""
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
