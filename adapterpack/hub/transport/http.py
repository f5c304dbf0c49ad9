"""Sends requests to a hub: the token never goes to another host, and no response exceeds limits of size and
time.

The official client by itself reads every response to its end and decompresses it, follows a listing to any
host, sends the token along, and waits as long as the hub asks. This module uses only its session, headers and
settings.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import urljoin

import msgspec

from ...errors import HubError
from ...io import Json

_T = TypeVar("_T")
MAX_ANSWER = 16 << 20
"""The most bytes of a response that is no file; a listing of 20,000 files takes half of that."""
_MAX_REASON = 64 << 10
_MAX_REDIRECTS = 5
_MIN_RATE = 16 << 10
"""The least bytes a second, after a minute of grace. Without it a hub could hold a client for ever.
"""
_GRACE = 60.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CODES = {
    "GatedRepo": "gated",
    "RepoNotFound": "repo",
    "RevisionNotFound": "revision",
    "EntryNotFound": "entry",
}


@dataclass(frozen=True)
class Endpoint:
    """The URL of a hub and its token; None is the user's own token, False no token. ``headers`` go to no
    other host.
    """

    url: str
    token: str | bool | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def anonymous(self) -> Endpoint:
        """The same URL without a token."""
        return replace(self, token=False)


class ErrorResponse(Exception):
    """A response with an error status; ``kind`` is gated, repo, revision or entry if the hub says so, else
    None.
    """

    def __init__(self, response: Any, reason: str) -> None:
        super().__init__(f"{response.status_code} {reason}".strip())
        self.response = response
        code = str(response.headers.get("X-Error-Code", ""))
        self.kind = _CODES.get(code)
        # a private or missing repository; the hub does not say which
        if response.status_code == 401 and not code and "Invalid credentials" not in reason:
            self.kind = "repo"


class ByteLimit:
    """Counts the bytes of one response, or of several together, against a maximum."""

    def __init__(self, where: object, maximum: int) -> None:
        self.where = where
        self.maximum = maximum
        self._left = maximum

    def add(self, count: int) -> None:
        """Counts bytes that have arrived.

        Raises:
            HubError: the response is too large.
        """
        self._left -= count
        if self._left < 0:
            raise HubError(
                "the hub's answer is too large",
                where=self.where,
                expected=f"at most {self.maximum} bytes",
                remedy="do not use this hub",
            )


def allowed_seconds(count: int) -> float:
    """Returns the time that ``count`` bytes may take. The client's own timeout only limits the pause between
    two reads.
    """
    from huggingface_hub import constants  # noqa: PLC0415 - only a named hub pays for it

    return min(_GRACE, 6 * float(constants.HF_HUB_DOWNLOAD_TIMEOUT)) + count / _MIN_RATE


@contextmanager
def open_response(
    method: str,
    url: str,
    endpoint: Endpoint,
    where: object,
    *,
    headers: Mapping[str, str] | None = None,
    seconds: float | None = None,
    pause: float | None = None,
    check: Callable[[Any], None] | None = None,
    **content: Any,
) -> Iterator[Any]:
    """Sends a request and yields its response before the body is read. Follows redirects of a GET as separate
    requests.

    ``seconds`` limits the time until the response's head arrives, by default a minute, and ``pause`` the
    silence between reads, by default the same. ``check`` inspects the first response before a redirect is
    followed. ``content`` is the body, as json= or content=.

    Raises:
        HubError: a URL is neither the hub's nor https, or the head does not arrive in time.
        ErrorResponse: the hub answers with an error.
    """
    from huggingface_hub.utils import build_hf_headers, get_session  # noqa: PLC0415

    seconds = allowed_seconds(0) if seconds is None else seconds
    session = get_session()
    home = origin(session.build_request("GET", endpoint.url))
    for_all = {**build_hf_headers(token=False), "Accept-Encoding": "identity", **(headers or {})}
    for_home = {**build_hf_headers(token=endpoint.token), **endpoint.headers, **for_all}
    secret = for_home.get("authorization", "").removeprefix("Bearer ")
    for _ in range(_MAX_REDIRECTS + 1):
        request = session.build_request(method, url, headers=for_all, timeout=pause or seconds, **content)
        at_home = origin(request) == home
        if at_home:
            request.headers.update(for_home)
        elif request.url.scheme != "https":
            raise HubError(
                "the hub sends its clients to an address that is neither its own nor https",
                where=where,
                found=request.url.host,
                remedy="do not use this hub",
            )
        response = _send(session, request, where, seconds)
        response.extensions["secret"] = secret
        try:
            require_unrepeated(secret, " ".join(response.headers.values()), where)
            if check is not None:
                check(response)
                check = None
            if response.status_code in _REDIRECTS and method == "GET":
                url = urljoin(url, response.headers.get("Location", ""))
                continue
            if response.status_code >= 300:
                raise _error(response, where, None if at_home else request.url.host)
            require_identity(response, where)
            yield response
            return
        finally:
            response.close()
    raise HubError(
        "the hub sends its clients in circles", where=where, expected=f"at most {_MAX_REDIRECTS} redirects"
    )


def require_unrepeated(secret: str, text: str, where: object) -> None:
    """Checks that a response does not contain the token, which could otherwise end up in logs and files.

    Raises:
        HubError: the response contains the token.
    """
    if secret and secret in text:
        raise HubError(
            "the hub does not answer as it should: it repeats the token",
            where=where,
            remedy="do not use this hub, and revoke the token",
        )


def require_identity(response: Any, where: object) -> None:
    """Checks that the body is not compressed, because a compressed one could expand to any size.

    Raises:
        HubError: the body is compressed.
    """
    encoding = str(response.headers.get("Content-Encoding", "identity"))
    if encoding != "identity":
        raise HubError("the hub compresses what was to come as it is", where=where, found=encoding[:40])


def in_time(chunks: Iterable[bytes], where: object) -> Iterator[bytes]:
    """Yields the chunks of a body as they arrive; the caller counts their bytes.

    Raises:
        HubError: the body arrives too slowly.
    """
    started = time.monotonic()
    count = 0
    for chunk in chunks:
        count += len(chunk)
        if time.monotonic() - started > allowed_seconds(count):
            raise too_slow(where, f"{count} bytes in {time.monotonic() - started:.0f} s")
        yield chunk


def read_body(response: Any, where: object, limit: ByteLimit) -> bytes:
    """Reads a body to its end.

    Raises:
        HubError: it is too large, or arrives too slowly.
    """
    data = bytearray()
    for chunk in in_time(response.iter_raw(), where):
        limit.add(len(chunk))
        data += chunk
    return bytes(data)


def request_json(
    method: str,
    url: str,
    endpoint: Endpoint,
    where: object,
    kind: type[_T],
    limit: ByteLimit | None = None,
    **content: Any,
) -> tuple[Any, _T]:
    """Sends a request and returns the response with its JSON value as a ``kind``. Several requests may share
    ``limit``.

    Raises:
        HubError: the body is too large, no JSON or not of that kind, or see :func:`open_response` and
            :func:`in_time`.
        ErrorResponse: the hub answers with an error.
    """
    limit = limit or ByteLimit(where, MAX_ANSWER)
    with open_response(method, url, endpoint, where, **content) as response:
        data = read_body(response, where, limit)
        # headers count too: the session keeps some as cookies
        limit.add(sum(map(len, response.headers.values())))
    text = data.decode("utf-8", "replace")
    secret = response.extensions["secret"]
    require_unrepeated(secret, text, where)
    try:
        value = json.loads(data)
        if "\\" in text:  # the token could be hidden in JSON escapes
            require_unrepeated(secret, json.dumps(value, ensure_ascii=False), where)
        return response, msgspec.convert(value, kind)
    except (ValueError, RecursionError):
        expected = "JSON"
        found = repr(data[:40])
    except msgspec.ValidationError as error:
        expected = "what its API describes"
        found = str(error)[:200]
    raise HubError("the hub does not answer as it should", where=where, expected=expected, found=found)


def post_json(url: str, endpoint: Endpoint, where: object, value: Json, **options: Any) -> None:
    """Posts a JSON value and expects success without a result.

    Raises:
        HubError, ErrorResponse: see :func:`open_response`.
    """
    with open_response("POST", url, endpoint, where, json=value, **options):
        pass


def origin(request: Any) -> tuple[str, str, int | None]:
    """Returns scheme, host and port of a request, as the sending client parses them."""
    return request.url.scheme, request.url.host, request.url.port


def same_origin(url: str, other: str) -> bool:
    """Returns whether two URLs have the same scheme, host and port, as the client parses them."""
    from huggingface_hub.utils import get_session  # noqa: PLC0415

    return origin(get_session().build_request("GET", url)) == origin(
        get_session().build_request("GET", other)
    )


def too_slow(where: object, found: str) -> HubError:
    """Makes the error for a hub that sends too slowly."""
    return HubError(
        "the hub sends too slowly",
        where=where,
        expected=f"{_MIN_RATE} bytes a second after the first minute",
        found=found,
        remedy="try again, or raise HF_HUB_DOWNLOAD_TIMEOUT",
    )


def _send(session: Any, request: Any, where: object, seconds: float) -> Any:
    """Returns the response once its head has arrived. A thread waits for it, and is abandoned if the head
    takes too long.
    """
    future: Future[Any] = Future()

    def send() -> None:
        try:
            future.set_result(session.send(request, stream=True, follow_redirects=False))
        except BaseException as error:  # for the thread that waits to raise
            future.set_exception(error)

    threading.Thread(target=send, daemon=True, name="adapterpack-hub").start()
    try:
        return future.result(seconds)
    except BaseException as error:
        in_time = future.done()
        future.add_done_callback(_close)
        if isinstance(error, TimeoutError) and not in_time:
            raise too_slow(where, f"no answer within {seconds:.0f} s") from None
        raise


def _close(future: Future[Any]) -> None:
    with suppress(BaseException):
        future.result().close()


def _error(response: Any, where: object, host: str | None) -> Exception:
    """Makes the error for a response; ``host`` is the host that sent it, if it is not the hub's own."""
    if "X-Xet-Hash" in response.headers:
        return HubError(
            "the hub gives this file through the Xet service only",
            where=where,
            remedy="fetch the folder with the hub's own client (hf download), and name the folder",
        )
    if host is not None:
        return HubError(
            f"the host that keeps the hub's files answers {response.status_code}", where=where, found=host
        )
    reason = response.headers.get("X-Error-Message", "")
    data = b""
    if not reason and "Content-Encoding" not in response.headers:
        for chunk in in_time(response.iter_raw(), where):
            data += chunk
            if len(data) > _MAX_REASON:
                break
        reason = data.decode("utf-8", "replace")
        require_unrepeated(response.extensions["secret"], reason, where)
    return ErrorResponse(response, reason)
