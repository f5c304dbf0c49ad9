"""``/v1/status``: what a key may see of a server: its own traffic and its adapters, or everything with an
operator's key.

Only operators see how much of prompts was cached and which adapters are in memory, because both reveal what
others asked.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any, Literal

from msgspec import UNSET, UnsetType
from starlette.responses import Response

from ..io import FrozenStruct
from ..version import VERSION
from .adapters.adapter_control import Facts
from .admin import RefusalCard
from .observability import Counts, Tally, Wait
from .route import RequestContext, RouteSpec, State, json_response
from .tenants import EVERYBODY, Key


class ServerStatus(FrozenStruct, kw_only=True):
    """The state of a server, and the traffic of the key, or of all keys for an operator.

    Attributes:
        of: whose traffic it is: that of the key, or of all keys.
        key: the name of the key.
        time: seconds of the server's monotonic clock, for computing rates.
        waiting: answers that wait for the engine.
        running: answers that it is generating.
        wait: times to the first token or result in the last five minutes; null if there was no request.
        engine: further metrics by name, for operators only.
    """

    version: str
    base: str
    of: Literal["key", "all"]
    key: str
    time: float
    waiting: int
    running: int
    counts: Counts
    wait: Wait | None
    engine: dict[str, float] | UnsetType = UNSET


class ModelStatus(FrozenStruct, kw_only=True):
    """A model: the base (``adapter`` is null), or an adapter with its generation, load time and pack.

    ``headless`` says that the head which its answers need was never trained. ``resident`` says whether its
    values are in memory, for operators only.
    """

    name: str
    digest: str
    headless: bool
    counts: Counts
    adapter: Facts | None = None
    generation: int | None = None
    loaded: datetime | None = None
    resident: bool | UnsetType = UNSET


class ModelStatusList(FrozenStruct):
    """The base and the adapters that the key may name; for an operator all of them, and the packs that were
    refused.
    """

    models: list[ModelStatus]
    refused: list[RefusalCard] | UnsetType = UNSET


async def status(context: RequestContext) -> Response:
    """``GET /v1/status``: returns the traffic of the key, or of all keys."""
    state = context.state
    key = context.key
    tally = _tally(context)
    figures = {figure.name: figure.value() for figure in state.metrics.figures} if key.admin else UNSET
    return json_response(
        ServerStatus(
            version=VERSION,
            base=state.catalogue.base,
            of="all" if key.admin else "key",
            key=key.id,
            time=state.traffic.clock(),
            waiting=tally.waiting,
            running=tally.running,
            counts=tally.counts,
            wait=tally.wait,
            engine=figures,
        )
    )


async def models(context: RequestContext) -> Response:
    """``GET /v1/status/models``: lists models with their packs and traffic. Summarizing a thousand packs for
    the first time takes a moment, so it runs on another thread.
    """
    models = await asyncio.to_thread(_models, context.state, context.key, _tally(context))
    refused = (
        [
            # without paths of this machine
            RefusalCard.of(one, one.message.replace(str(one.place), one.place.name))
            for one in context.state.adapters.refused
        ]
        if context.key.admin
        else UNSET
    )
    return json_response(ModelStatusList(models, refused))


STATUS_ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec(
        "GET",
        "/v1/status",
        status,
        "key",
        "the traffic of the key, or of all",
        None,
        ServerStatus,
        quiet=True,
    ),
    RouteSpec(
        "GET",
        "/v1/status/models",
        models,
        "key",
        "base and adapters with what they are and had",
        None,
        ModelStatusList,
        quiet=True,
    ),
)
"""The routes of a server's status. They are quiet, so that polling does not fill the audit log."""


def _models(state: State, key: Key, tally: Tally) -> list[ModelStatus]:
    adapters = {one.name: one for one in state.adapters.adapters}
    resident = set(state.engine.engine.adapters.digests) if key.admin else None
    bundle = state.engine.engine.bundle
    statuses = []
    for model in state.catalogue.visible(EVERYBODY if key.admin else key):
        more: dict[str, Any] = {}
        if model.pack is not None and (adapter := adapters.get(model.name)) is not None:
            more = {
                "adapter": adapter.facts,
                "generation": adapter.generation,
                "loaded": adapter.loaded,
                "resident": UNSET if resident is None else model.digest in resident,
            }
        statuses.append(
            ModelStatus(
                name=model.name,
                digest=model.digest,
                headless=bool(bundle.task.heads) and not bundle.head(model.pack).trained,
                counts=tally.of(model.adapter),
                **more,
            )
        )
    return statuses


def _tally(context: RequestContext) -> Tally:
    traffic = context.state.traffic
    return traffic.all if context.key.admin else traffic.of(context.key.id)
