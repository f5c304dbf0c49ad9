"""The operator's routes, at an address of their own: list, load and unload adapters, with the paths
of vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Annotated

from msgspec import Meta
from starlette.responses import Response

from ..errors import AdapterpackError, StorageError, UnknownName
from ..http import HTTPError
from ..io import ClosedStruct, FrozenStruct
from .adapters.adapter_control import Refusal, ServedAdapter
from .observability import Record
from .openapi import document
from .route import RequestContext, RouteSpec, json_response
from .routes import health, metrics, ready

_Name = Annotated[str, Meta(min_length=1, max_length=128)]


class LoadRequest(ClosedStruct):
    """The pack to load, and its name for requests.

    Attributes:
        lora_name: the name that requests use.
        lora_path: the name of the pack's folder in a folder of adapters (never a path), or an entry of a lock
            file; by default ``lora_name``.
        load_inplace: whether it may replace the adapter that has the name now.
    """

    lora_name: _Name
    lora_path: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    load_inplace: bool = False


class UnloadRequest(ClosedStruct):
    """The adapter to unload."""

    lora_name: _Name


class AdapterCard(FrozenStruct):
    """An adapter: its digest; its generation, which counts the packs that have had its name; its source,
    which is a folder name or an entry of a lock file; and when it was loaded.
    """

    name: str
    digest: str
    generation: int
    source: str | None
    loaded: datetime


class RefusalCard(FrozenStruct):
    """A watched pack that was not loaded: its folder name or entry in a lock file, the code of the reason, a
    message, and the time.
    """

    source: str
    reason: str
    message: str
    time: datetime

    @classmethod
    def of(cls, refusal: Refusal, message: str) -> RefusalCard:
        """Makes the card of a refusal, with a message for its readers."""
        return cls(refusal.place.name, refusal.reason, message, refusal.time)


class AdapterList(FrozenStruct):
    """The adapters that requests may name, and the packs that were refused."""

    adapters: list[AdapterCard]
    refused: list[RefusalCard]


async def adapters(context: RequestContext) -> Response:
    """``GET /v1/adapters``: lists the adapters, and the packs that were refused."""
    return json_response(
        AdapterList(
            [_card(one) for one in context.state.adapters.adapters],
            [RefusalCard.of(one, one.message) for one in context.state.adapters.refused],
        )
    )


async def load_adapter(context: RequestContext) -> Response:
    """``POST /v1/load_lora_adapter``: loads an adapter."""
    body = await context.read_body(LoadRequest)
    source = body.lora_path or body.lora_name
    name = body.lora_name
    return await _change(
        context.record, lambda: context.state.adapters.load(source, name, replace=body.load_inplace)
    )


async def unload_adapter(context: RequestContext) -> Response:
    """``POST /v1/unload_lora_adapter``: unloads an adapter."""
    body = await context.read_body(UnloadRequest)
    return await _change(context.record, lambda: context.state.adapters.unload(body.lora_name))


async def openapi(context: RequestContext) -> Response:
    """``GET /openapi.json``: describes these routes."""
    return json_response(document(ADMIN_ROUTES))


ADMIN_ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec("GET", "/health", health, "open", "whether the process works"),
    RouteSpec("GET", "/ready", ready, "open", "whether it takes requests"),
    RouteSpec("GET", "/metrics", metrics, "admin", "counters and times for Prometheus"),
    RouteSpec("GET", "/openapi.json", openapi, "admin", "this document"),
    RouteSpec(
        "GET",
        "/v1/adapters",
        adapters,
        "admin",
        "the adapters, and the packs that were refused",
        None,
        AdapterList,
    ),
    RouteSpec(
        "POST",
        "/v1/load_lora_adapter",
        load_adapter,
        "admin",
        "load an adapter, or exchange one",
        LoadRequest,
        AdapterCard,
    ),
    RouteSpec(
        "POST",
        "/v1/unload_lora_adapter",
        unload_adapter,
        "admin",
        "unload an adapter",
        UnloadRequest,
        AdapterCard,
    ),
)
"""All routes of the operator's address."""


async def _change(record: Record, change: Callable[[], ServedAdapter]) -> Response:
    """Makes a change on another thread, since it reads files. The operator gets the complete error message;
    tenants never do.

    Raises:
        HTTPError: the change failed.
    """
    try:
        adapter = await asyncio.to_thread(change)
    except AdapterpackError as error:
        status = 404 if isinstance(error, UnknownName) else 500 if isinstance(error, StorageError) else 400
        raise HTTPError(status, error.code, str(error)) from error
    record.adapter, record.digest = adapter.name, adapter.digest
    return json_response(_card(adapter))


def _card(adapter: ServedAdapter) -> AdapterCard:
    source = None if adapter.place is None else adapter.place.name
    return AdapterCard(adapter.name, adapter.digest, adapter.generation, source, adapter.loaded)
