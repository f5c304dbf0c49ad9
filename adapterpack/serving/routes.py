"""The routes that every server has, and the table of all routes for the application and the OpenAPI
document.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.responses import Response

from ..pack import AUTO
from ..version import VERSION
from .catalogue import ServedModel
from .observability import TEXT_TYPE
from .openai import ModelCard, ModelList
from .openapi import document
from .route import RequestContext, RouteSpec, State, json_response


async def health(context: RequestContext) -> Response:
    """``GET /health``: 503 if an engine step is stuck or the engine's thread has ended; ``degraded`` if the
    file of keys cannot be read.
    """
    stuck = context.state.engine.stuck(context.state.limits.stuck_seconds)
    if context.state.engine.failure is not None:
        return json_response({"status": "stopped"}, 503)
    if stuck is not None:
        return json_response({"status": "stuck", "step": stuck}, 503)
    await context.state.keys.look()
    if unread := context.state.keys.unread_seconds:
        return json_response({"status": "degraded", "keys": f"could not be read for {unread:.0f} s"})
    return json_response({"status": "ok"})


async def ready(context: RequestContext) -> Response:
    """``GET /ready``: 503 if the server is shutting down, or could not read the file of keys for too long."""
    well = (
        context.state.engine.failure is None
        and not context.state.admission.draining
        and context.state.keys.counted
    )
    return json_response({"ready": well}, 200 if well else 503)


async def version(context: RequestContext) -> Response:
    """``GET /version``: returns the version of adapterpack."""
    return json_response({"version": VERSION})


async def metrics(context: RequestContext) -> Response:
    """``GET /metrics``: returns all metrics in Prometheus's text format."""
    return Response(context.state.metrics.text(), media_type=TEXT_TYPE)


async def models(context: RequestContext) -> Response:
    """``GET /v1/models``: lists the base, the adapters that the key may name, and ``auto`` if it can choose
    one of them.
    """
    visible = context.state.catalogue.visible(context.key)
    texts = context.state.adapters.texts
    names = [one.name for one in visible]
    if AUTO not in names and any(name in texts for name in names):
        visible.append(ServedModel(AUTO, None, context.state.catalogue.digest))
    return json_response(ModelList([_card(context.state, model) for model in visible]))


async def model(context: RequestContext) -> Response:
    """``GET /v1/models/{model}``: describes one model."""
    found = await context.request_model(context.request.path_params["model"], counts=False)
    return json_response(_card(context.state, found))


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
    """Returns these routes, ``more``, and the route of the OpenAPI document of all of them."""

    async def openapi(context: RequestContext) -> Response:
        return json_response(document(routes))

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
