"""The error that becomes an answer of a server."""

from __future__ import annotations

from typing import Any

from ..errors import AdapterpackError


class HTTPError(AdapterpackError):
    """What a server answers instead: an HTTP status, the name that clients know the error by, and ``more``
    fields of the answer.
    """

    code = "refused"

    def __init__(self, status: int, name: str, what: str, **more: Any) -> None:
        super().__init__(what)
        self.status, self.name, self.more = status, name, more
