"""A bundle on Ray Serve: replicas that keep their adapters, each of which mixes all of its requests in one
batch.

    pip install 'adapterpack[serve,ray]'
    ADAPTERPACK_BUNDLE=/bundle/served ADAPTERPACK_ADAPTERS=/bundle/adapters serve run
    examples.serving.ray_serve:app

The front reads the ``model`` of a request and gives it on with that name; the router of the replicas orders
them by rendezvous hashing, so that an adapter stays with one replica while that has room, and moves where it
goes. Ray's own multiplexing would give a replica one adapter at a time. Ray's router API is alpha: this runs
with ray 2.60.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import StreamingResponse

from adapterpack.serving.embedded import Application, scope_of

ROWS = 8
"""Answers that a replica writes at a time."""


class AdapterAffinity(RequestRouter):
    """Asks the replicas in the order that the adapter's name gives them: the next one where the first has no
    room for a request more, or does not say how much it has.
    """

    queue_len_response_deadline_s = 1.0
    max_queue_len_response_deadline_s = 5.0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas, each in a rank of its own."""
        name = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        ranked = sorted(
            candidate_replicas, key=lambda one: _score(one.replica_id.unique_id, name), reverse=True
        )
        return [[replica] for replica in ranked]


def _score(replica: str, name: str) -> bytes:
    """A replica's number for a name: the largest wins, so that where a replica goes its names alone move,
    and to all others.
    """
    return hashlib.sha256(f"{replica}\0{name}".encode("utf-8", "surrogatepass")).digest()


@serve.deployment(
    max_ongoing_requests=2 * ROWS,
    autoscaling_config={
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": ROWS,
        "downscale_delay_s": 300,
    },
    request_router_config=RequestRouterConfig(request_router_class=AdapterAffinity),
    graceful_shutdown_timeout_s=75,
)
class Server:
    """One replica: the routes of ``adapterpack serve``, without an address."""

    def __init__(self, bundle: str, adapters: list[str], threads: int | None) -> None:
        self.application = Application(bundle, adapters=adapters, threads=threads, max_rows=ROWS)

    async def __call__(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> AsyncIterator[Any]:
        """The status and headers of an answer, and then its bytes as they come. Where nobody listens any more
        its rows are ended.
        """
        given, gone, sent = (
            [{"type": "http.request", "body": body, "more_body": False}],
            asyncio.Event(),
            asyncio.Queue[Any](),
        )

        async def receive() -> Any:
            if not given:
                await gone.wait()
                return {"type": "http.disconnect"}
            return given.pop()

        task = asyncio.create_task(self.application(scope_of(method, path, headers), receive, sent.put))
        task.add_done_callback(lambda done: sent.put_nowait({"type": "end"}))
        try:
            while (message := await sent.get())["type"] != "end":
                if message["type"] == "http.response.start":
                    replica = ("x-ray-replica", serve.get_replica_context().replica_id.unique_id)
                    yield (
                        message["status"],
                        [
                            *(
                                (name.decode("latin-1"), value.decode("latin-1"))
                                for name, value in message["headers"]
                            ),
                            replica,
                        ],
                    )
                elif message.get("body"):
                    yield message["body"]
        finally:
            gone.set()

    async def check_health(self) -> None:
        """What Ray asks now and then: a replica whose engine has stopped is replaced."""
        if self.application.thread.failure is not None or self.application.thread.stuck(60.0) is not None:
            raise RuntimeError("the engine has stopped")


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Front:
    """Takes requests by HTTP, and gives them on to the replica of their adapter."""

    def __init__(self, server: Any) -> None:
        self.server = server.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        """One request; its answer comes as the replica writes it."""
        body = await request.body()
        answer = self.server.options(multiplexed_model_id=model_of(body)).remote(
            request.method, request.url.path, request.headers.items(), body
        )
        pieces = aiter(answer)
        status, headers = await anext(pieces)
        kept = {name: value for name, value in headers if name != "content-length"}
        return StreamingResponse(pieces, status, kept)


def model_of(body: bytes) -> str:
    """The name of a request's adapter; that of the base, or none, is as good as any."""
    try:
        value = json.loads(body) if body else {}
    except ValueError:
        return ""
    return str(value.get("model", "")).rpartition(":")[2] if isinstance(value, dict) else ""


def application(
    bundle: str, adapters: list[str], threads: int | None = None, replicas: int | None = None
) -> Any:
    """The application of a bundle and packs, or folders of packs; with so many ``replicas``, or as many as
    the load needs.
    """
    server = Server if replicas is None else Server.options(num_replicas=replicas, autoscaling_config=None)
    return Front.bind(server.bind(bundle, adapters, threads))


if "ADAPTERPACK_BUNDLE" in os.environ:
    app = application(
        os.environ["ADAPTERPACK_BUNDLE"], list(filter(None, [os.environ.get("ADAPTERPACK_ADAPTERS")]))
    )
