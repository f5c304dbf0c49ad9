"""The ASGI application that gives requests on to replicas, and their answers back as they come.

A request goes on to the next replica only where the first could not be reached, or says that it takes none (503): one that may have been
begun is never sent twice, since what ended a replica could end them all.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response

from ...http.bodies import body_of, require_size
from ...http.refused import Refused
from ..metrics import TEXT_TYPE
from ..openai import sse
from ..openai.refusals import details, response
from .figures import Figures, Outcome
from .rendezvous import Replica, Replicas

_LOG = logging.getLogger("adapterpack.serving")
_HOP = frozenset({"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade",
                  "host", "content-length"})
"""Headers that concern one connection alone."""
OWN_PATHS = ("/health", "/ready")
"""What the router answers itself, to everybody."""
_METRICS = "/metrics"
"""What it answers to those who may see the metrics of its replicas."""
_READY_SECONDS = 2.0
_METRICS_SECONDS = 5.0


class Forwarding:
    """Gives requests on; those of one model go to one replica. ``body_bytes`` is the most that a request may have."""

    def __init__(self, replicas: Replicas, client: httpx.AsyncClient, body_bytes: int, body_seconds: float) -> None:
        self._replicas, self._client, self._bytes, self._seconds = replicas, client, body_bytes, body_seconds
        self._figures = Figures(replicas)
        self._own = {**dict(zip(OWN_PATHS, (self._health, self._ready), strict=True)), _METRICS: self._metrics}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request. Where the client goes away, the replica hears of it."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            own = self._own.get(scope["path"])
            if own is not None:
                await (await own(request))(scope, receive, send)
                return
            if not scope["raw_path"].startswith(b"/"):  # "@host/" behind a replica's address would be another host
                raise Refused(400, "invalid_request", "a request's target is a path")
            require_size(request, self._bytes)
            body = await body_of(request, self._seconds)
        except Refused as refused:
            await response(Refused(refused.status, "invalid_request", refused.what, close=True))(scope, receive, send)
            return
        answer = asyncio.create_task(self._answer(request, body, send))
        gone = asyncio.create_task(_gone(receive))
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not answer.done():
            answer.cancel()
        with suppress(asyncio.CancelledError):
            await answer

    async def _answer(self, request: Request, body: bytes, send: Any) -> None:
        started = False
        try:
            async with self._asked(request, body) as answer:
                headers = [(name, value) for name, value in answer.headers.raw if name.decode("latin-1").lower() not in _HOP]
                whole = [(name, value) for name, value in answer.headers.raw if name.lower() == b"content-length"]
                await send({"type": "http.response.start", "status": answer.status_code, "headers": [*headers, *whole]})
                started = True
                async for piece in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Refused as refused:
            await response(refused)(request.scope, request.receive, send)
        except httpx.TransportError as error:
            _LOG.error("a replica broke off an answer: %s", error or type(error).__name__)
            lost = Refused(502, "replica_lost", "the server that was answering has ended", retry_after=1)
            if not started:
                await response(lost)(request.scope, request.receive, send)
            elif answer.headers.get("content-type", "").startswith(sse.TYPE):
                await send({"type": "http.response.body", "body": sse.event(details(lost)), "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                raise  # the connection is closed: what was sent is not whole

    @asynccontextmanager
    async def _asked(self, request: Request, body: bytes) -> AsyncIterator[httpx.Response]:
        """The answer of the first replica that takes the request.

        Raises:
            Refused: none does.
            httpx.TransportError: the one that took it has ended.
        """
        order = self._replicas.order(_name(request.url.path, body))
        for place, replica in enumerate(order):
            with replica.busy():
                try:
                    answer = await self._client.send(self._given(request, body, replica), stream=True)
                except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                    self._failed(replica, "passed_on", error)
                    continue
                except httpx.TransportError as error:
                    self._failed(replica, "lost", error)
                    raise
                try:
                    if answer.status_code == 503 and place + 1 < len(order):
                        self._failed(replica, "passed_on", "503")
                        continue
                    replica.gone_until = 0.0
                    yield answer
                    self._figures.count(replica.address, "answered")
                    return
                except httpx.TransportError as error:  # in the middle of the answer
                    self._failed(replica, "lost", error)
                    raise
                finally:
                    await answer.aclose()
        raise _none()

    def _given(self, request: Request, body: bytes, replica: Replica) -> httpx.Request:
        headers = [(name, value) for name, value in request.headers.raw if name.decode("latin-1") not in _HOP]
        query = request.scope["query_string"]
        url = httpx.URL(replica.address).copy_with(raw_path=request.scope["raw_path"] + (b"?" + query if query else b""))
        return self._client.build_request(request.method, url, content=body or None, headers=headers)

    def _failed(self, replica: Replica, outcome: Outcome, reason: object) -> None:
        self._replicas.failed(replica)
        self._figures.count(replica.address, outcome)
        _LOG.warning("%s takes no requests: %s", replica.address, str(reason) or type(reason).__name__)

    async def _health(self, request: Request) -> Response:
        """This process works."""
        return Response(b'{"status":"ok"}', media_type="application/json")

    async def _ready(self, request: Request) -> Response:
        """Whether a replica takes requests."""
        answers = await self._answers("/ready", _READY_SECONDS)
        return await self._health(request) if any(one.status_code == 200 for one in answers.values()) else response(_none())

    async def _metrics(self, request: Request) -> Response:
        """The router's figures and those of all replicas, to those who may see the latter: keys are the replicas' business."""
        answers = await self._answers(_METRICS, _METRICS_SECONDS, [one for one in request.headers.raw if one[0] == b"authorization"])
        said = {address: answer.text for address, answer in answers.items() if answer.status_code == 200}
        if said:
            return Response(self._figures.text(said), media_type=TEXT_TYPE)
        refusal = next(iter(answers.values()), None)
        if refusal is None:
            return response(_none())
        return Response(refusal.content, refusal.status_code, media_type=refusal.headers.get("content-type"))

    async def _answers(self, path: str, seconds: float, headers: Sequence[tuple[bytes, bytes]] = ()) -> dict[str, httpx.Response]:
        """What the replicas that can be reached answer, by their addresses."""
        async def one(replica: Replica) -> httpx.Response | None:
            try:
                return await self._client.get(replica.address + path, timeout=seconds, headers=list(headers))
            except httpx.TransportError:
                return None

        answers = await asyncio.gather(*map(one, self._replicas.all))
        return {replica.address: answer for replica, answer in zip(self._replicas.all, answers, strict=True) if answer is not None}


def _none() -> Refused:
    return Refused(503, "no_replica", "no server takes requests at the moment", retry_after=1)


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _name(path: str, body: bytes) -> str:
    """The name that decides where a request goes: its model's, or that in its path, or the path.

    Example:
        >>> _name("/v1/completions", b'{"model": "base:tickets"}'), _name("/v2/models/tickets/infer", b""), _name("/v1/models", b"")
        ('tickets', 'tickets', '/v1/models')
    """
    parts = path.split("/")
    if parts[:3] == ["", "v2", "models"] and len(parts) > 3:
        return parts[3]
    try:
        value = json.loads(body) if body else None
    except (ValueError, RecursionError):  # the replica says what is wrong with it
        value = None
    model = value.get("model") if isinstance(value, Mapping) else None
    return model.rpartition(":")[2] if isinstance(model, str) else path
