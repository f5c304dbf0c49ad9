"""A request to the hub as its handlers see it: with its repository, its account and its parsed body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import parse_qs

import msgspec
from starlette.requests import Request

from ...http import HTTPError, bad_request
from ...io import strict_json
from ..transport import MAX_LISTED, names
from .access import Access, Account
from .parts import UploadedParts
from .storage import HubStorage

_T = TypeVar("_T")


@dataclass(frozen=True)
class Hub:
    """What all requests share. Files of more than ``part`` bytes are uploaded in parts."""

    storage: HubStorage
    access: Access
    parts: UploadedParts
    part: int


@dataclass(frozen=True)
class HubRequest:
    """A request with the ``account`` of its token and its complete ``body``. Uploads read theirs while it
    arrives.
    """

    request: Request
    hub: Hub
    account: Account | None
    body: bytes = b""

    @property
    def storage(self) -> HubStorage:
        """The hub's storage."""
        return self.hub.storage

    @property
    def repo(self) -> str:
        """The repository in the path."""
        return f"{self.request.path_params['org']}/{self.request.path_params['name'].removesuffix('.git')}"

    @property
    def revision(self) -> str:
        """The revision in the path."""
        return str(self.request.path_params.get("rev", names.MAIN)).replace("%2F", "/")

    @property
    def path(self) -> str:
        """The file or folder in the path."""
        return str(self.request.path_params.get("path", "")).replace("%2F", "/")

    @property
    def author(self) -> str:
        """The name of the account; only for routes that need one."""
        assert self.account is not None
        return self.account.name

    @property
    def origin(self) -> str:
        """The hub's own URL as this client writes it."""
        return str(self.request.base_url).rstrip("/")

    def json(self, kind: type[_T]) -> _T:
        """Parses the JSON in the body; an empty body is an empty object.

        Raises:
            FormatError: the body is no JSON.
            HTTPError: the value does not fit.
        """
        return parse_json(self.body or b"{}", kind)

    def form(self) -> dict[str, list[str]]:
        """Parses the fields of a URL-encoded form.

        Raises:
            HTTPError: the form has more fields than a listing may have files.
        """
        try:
            return parse_qs(self.body.decode("utf-8", "replace"), max_num_fields=MAX_LISTED)
        except ValueError as error:
            raise HTTPError(413, "TooLarge", f"A form may have at most {MAX_LISTED} fields") from error


def parse_json(data: bytes, kind: type[_T]) -> _T:
    """Parses JSON into a struct or another type.

    Raises:
        FormatError: the bytes are no JSON.
        HTTPError: the value does not fit.
    """
    try:
        return msgspec.convert(strict_json.loads(data, "request", len(data)), kind)
    except msgspec.ValidationError as error:
        raise bad_request(str(error)[:300]) from error
