"""What a client can ask of every server, and the table of all routes, from which application and OpenAPI
document are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..version import VERSION
from .catalogue import ServedModel
from .observability.audit import Record
from .observability.metrics import TEXT_TYPE
from .openai.answers import ModelCard, ModelList
from .openapi import document
from .route import RouteSpec
from .state import State
from .tenants.keys import Key


async def health(state: State, request: Request, key: Key, record: Record) -> Response:
    """Whether the process works: 503 where a step of the engine is stuck, or its thread has ended;
    ``degraded`` where the file of keys cannot be read.
    """
    stuck = state.engine.stuck(state.limits.stuck_seconds)
    if state.engine.failure is not None:
        return _json({"status": "stopped"}, 503)
    if stuck is not None:
        return _json({"status": "stuck", "step": stuck}, 503)
    await state.keys.look()
    if unread := state.keys.unread_seconds:
        return _json({"status": "degraded", "keys": f"could not be read for {unread:.0f} s"})
    return _json({"status": "ok"})


async def ready(state: State, request: Request, key: Key, record: Record) -> Response:
    """Whether it takes requests: 503 once it is about to end, or could not read the file of keys for too
    long.
    """
    well = state.engine.failure is None and not state.admission.draining and state.keys.counted
    return _json({"ready": well}, 200 if well else 503)


async def version(state: State, request: Request, key: Key, record: Record) -> Response:
    """The version of adapterpack."""
    return _json({"version": VERSION})


async def metrics(state: State, request: Request, key: Key, record: Record) -> Response:
    """All series in Prometheus's text form."""
    return Response(state.metrics.text(), media_type=TEXT_TYPE)


async def models(state: State, request: Request, key: Key, record: Record) -> Response:
    """The base and the adapters that the key may name."""
    return _json(ModelList([_card(state, model) for model in state.catalogue.visible(key)]))


async def model(state: State, request: Request, key: Key, record: Record) -> Response:
    """One of them."""
    return _json(_card(state, state.catalogue.find_model(request.path_params["model"], key)))


ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec("GET", "/health", health, "open", "whether the process works"),
    RouteSpec("GET", "/ready", ready, "open", "whether it takes requests"),
    RouteSpec("GET", "/version", version, "key", "the version of adapterpack"),
    RouteSpec("GET", "/metrics", metrics, "admin", "counters and times for Prometheus"),
    RouteSpec("GET", "/v1/models", models, "key", "the base and the adapters", None, ModelList),
    RouteSpec("GET", "/v1/models/{model}", model, "key", "one of them", None, ModelCard),
)
"""The routes that do not depend on the engine."""


def table(more: Iterable[RouteSpec]) -> tuple[RouteSpec, ...]:
    """These, ``more``, and the document of all of them."""

    async def openapi(state: State, request: Request, key: Key, record: Record) -> Response:
        return _json(document(routes))

    routes = (*ROUTES, *more, RouteSpec("GET", "/openapi.json", openapi, "key", "this document"))
    return routes


def _card(state: State, model: ServedModel) -> ModelCard:
    parent = None if model.pack is None else state.catalogue.base
    return ModelCard(
        id=model.name,
        created=state.catalogue.created,
        root=model.digest,
        parent=parent,
        max_model_len=state.engine.engine.max_length,
    )


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
