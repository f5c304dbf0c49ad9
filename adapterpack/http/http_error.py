"""The exception that becomes an HTTP error response."""

from __future__ import annotations

from typing import Any

from ..errors import AdapterpackError


class HTTPError(AdapterpackError):
    """An error response: an HTTP status, the ``name`` by which clients know the error (``code`` is only this
    package's own), and ``more`` fields of the response.
    """

    code = "refused"

    def __init__(self, status: int, name: str, what: str, **more: Any) -> None:
        super().__init__(what)
        self.status = status
        self.name = name
        self.more = more


def bad_request(what: str) -> HTTPError:
    """Makes the hub's error (400) for a request that is malformed or does not fit; ``what`` says why."""
    return HTTPError(400, "BadRequest", what)


def invalid_request(what: str, param: str | None) -> HTTPError:
    """Makes the error (400) of OpenAI's routes; ``param`` is the field at fault, None for the whole body."""
    return HTTPError(400, "invalid_request", what, param=param)
