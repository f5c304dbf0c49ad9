"""The exception that becomes an HTTP error response."""

from __future__ import annotations

from typing import Any

from ..errors import AdapterpackError


class HTTPError(AdapterpackError):
    """An error response: an HTTP status, the name by which clients know the error, and ``more`` fields of the
    response.
    """

    code = "refused"

    def __init__(self, status: int, name: str, what: str, **more: Any) -> None:
        super().__init__(what)
        self.status, self.name, self.more = status, name, more


def bad_request(what: str) -> HTTPError:
    """Makes the error for a request that no server could answer (400)."""
    return HTTPError(400, "BadRequest", what)


def invalid_request(what: str, param: str | None) -> HTTPError:
    """Makes the error of OpenAI's routes for a request that does not fit (400), by the field at fault."""
    return HTTPError(400, "invalid_request", what, param=param)
