"""Lets the official client download bases, which it keeps for other programs too, without giving a hub more
than it is due.
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
"""The headers that the official client makes paths of."""
_PLAIN = re.compile(r'(W/)?"?[A-Za-z0-9_=+-]{0,200}"?')
_LONG_WAIT = re.compile(r"\d{4,}")


@contextmanager
def guarded_downloads(endpoint: str) -> Iterator[None]:
    """While the block runs, the official client takes the token to this hub alone, and the hub's answers are
    bounded as ours are.

    By itself it takes it also to where a listing goes on, and to where a hub says that its Xet service gives
    out keys. Its session belongs to the whole process, and it makes a new one where a connection fails: so
    what makes it is replaced, by one thread at a time. Another thread that uses it for another hub meanwhile
    goes there without its token.
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
        factory: Callable[[], Any] = _http._GLOBAL_CLIENT_FACTORY  # it can be set, and not be read otherwise
        set_client_factory(make_guarded)
        try:
            yield
        finally:
            set_client_factory(factory)


class _Guard:
    """The hooks of one session; ``home`` is the origin of the hub."""

    def __init__(self, home: tuple[str, str, int | None]) -> None:
        self.home, self.listings = home, 0

    def request(self, request: Any) -> None:
        """Takes the token away from other hosts, asks for answers as they are, and ends a listing that has no
        end.
        """
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
        """Bounds the answers that are no files, how long the hub may ask the client to wait, and what the
        client names its files by.
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
