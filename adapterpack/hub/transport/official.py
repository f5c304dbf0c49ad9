"""Lets the official client download base models into its shared cache, while limiting what a hub can do to
it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import HubError
from .client import MAX_PAGES
from .http import MAX_ANSWER, ByteLimit, in_time, origin, require_identity

_LOCK = threading.Lock()
_FILE_NAMES = ("ETag", "X-Linked-Etag", "X-Repo-Commit")
"""The headers from which the official client forms paths."""
_PLAIN = re.compile(r'(W/)?"?[A-Za-z0-9_=+-]{0,200}"?')
_LONG_WAIT = re.compile(r"\d{4,}")


@contextmanager
def guarded_downloads(endpoint: str) -> Iterator[None]:
    """While the block runs, the official client sends the token to this hub only, and the hub's responses are
    limited.

    By itself the client also sends the token wherever a listing continues, and wherever a hub says that its
    Xet service issues keys. Its session is global and is recreated when a connection fails, so this replaces
    the factory of sessions, for one thread at a time. Another thread that meanwhile uses another hub does so
    without its token.
    """
    from huggingface_hub import set_client_factory  # noqa: PLC0415 - only a named hub pays for it
    from huggingface_hub.utils import _http  # noqa: PLC0415

    def make_guarded() -> Any:
        session = factory()
        guard = _Guard(origin(session.build_request("GET", endpoint)))
        session.event_hooks["request"].append(guard.request)
        session.event_hooks["response"].append(guard.response)
        return session

    with _LOCK:
        factory: Callable[[], Any] = _http._GLOBAL_CLIENT_FACTORY  # the library has a setter, but no getter
        set_client_factory(make_guarded)
        try:
            yield
        finally:
            set_client_factory(factory)


class _Guard:
    """The hooks of one session; ``home`` is the origin of the hub."""

    def __init__(self, home: tuple[str, str, int | None]) -> None:
        self.home = home
        self.listings = 0

    def request(self, request: Any) -> None:
        """Removes the token for other hosts, asks for uncompressed responses, and ends an endless listing."""
        if origin(request) != self.home:
            request.headers.pop("Authorization", None)
        if "/api/" in request.url.path:
            request.headers["Accept-Encoding"] = "identity"
        if "/tree/" in request.url.path:
            self.listings += 1
            if self.listings > MAX_PAGES:
                raise HubError(
                    "the hub's listing has no end", where=request.url.host, remedy="do not use this hub"
                )

    def response(self, response: Any) -> None:
        """Limits responses that are no files and the time that the hub may ask the client to wait, and checks
        the headers that become file names.
        """
        if response.request.method == "HEAD" or origin(response.request) == self.home:
            for name in _FILE_NAMES:
                if not _PLAIN.fullmatch(response.headers.get(name, "")):
                    raise HubError(
                        "the hub names a file by what must not become one here",
                        where=response.request.url.host,
                        expected=f"letters and digits in {name}",
                        remedy="do not use this hub",
                    )
        for name in ("Retry-After", "RateLimit"):
            if name in response.headers:
                response.headers[name] = _LONG_WAIT.sub("999", response.headers[name])
        if "/api/" in response.request.url.path:
            require_identity(response, response.request.url.host)
            response.iter_bytes = _limit_chunks(response.iter_bytes, str(response.request.url.host))


def _limit_chunks(chunks: Callable[..., Iterator[bytes]], where: str) -> Callable[..., Iterator[bytes]]:
    def iter_bytes(*args: Any, **options: Any) -> Iterator[bytes]:
        limit = ByteLimit(where, MAX_ANSWER)
        for chunk in in_time(chunks(*args, **options), where):
            limit.add(len(chunk))
            yield chunk

    return iter_bytes
