"""Puts a server together from its parts, before an event loop runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from starlette.applications import Starlette

from ..http import Protocol
from ..io import without_none
from ..pack import Pack, Signers
from ..paths import StrPath
from ..runtime import Engine
from .adapters.adapter_control import AdapterControl
from .adapters.adapter_source import source_on_request
from .adapters.on_request import OnRequest
from .adapters.startup import StartupAdapters
from .api import Api, apis_of
from .app import build
from .catalogue import Catalogue
from .observability import AuditLog, Figure, Metrics, Traffic
from .route import RouteSpec, State
from .routes import table
from .scheduling import Admission, EngineThread
from .status import STATUS_ROUTES
from .tenants import Keys, Quotas, ServerLimits


class Assembly(NamedTuple):
    """A server before its engine's thread starts: the state that its routes share, its APIs, and its
    application.
    """

    state: State
    apis: list[Api]
    app: Starlette

    def close(self) -> None:
        """Stops what the APIs have opened."""
        for api in self.apis:
            api.close()


def assemble(
    engine: Engine,
    adapters: Sequence[Pack | StrPath],
    keys: Keys,
    limits: ServerLimits,
    options: Mapping[str, Any],
    *,
    name: str | None,
    audit: str | None,
    signers: Signers | None = None,
    fetch: Sequence[StrPath] = (),
    changing: bool = False,
    watched: bool = False,
    hosts: frozenset[str] | None = None,
    pages: Sequence[RouteSpec] = (),
    thread: type[EngineThread] = EngineThread,
) -> Assembly:
    """Loads the adapters of a server, and opens the APIs that its engine supports with those of their
    ``options`` that are not None.

    Raises:
        AdapterpackError: see :func:`adapterpack.serve`.
    """
    catalogue = Catalogue(engine, name)
    metrics = Metrics()
    quotas = Quotas()
    given = StartupAdapters.of(adapters)
    control = AdapterControl(
        engine.adapters, catalogue.base, given.sources, signers or Signers(), metrics.count_change
    )
    fetched = OnRequest(control, [source_on_request(one) for one in fetch])
    given.load(control, changing=changing, watched=watched)
    state = State(
        engine=thread(engine, metrics.record_step),
        catalogue=catalogue,
        adapters=control,
        admission=Admission.of(engine, limits),
        keys=keys,
        quotas=quotas,
        limits=limits,
        metrics=metrics,
        ended=[metrics.record, AuditLog(audit).write],
        traffic=Traffic(),
        fetched=fetched,
        hosts=hosts,
    )
    apis = apis_of(engine, limits, without_none(options))
    metrics.add_quotas(quotas)
    for figure in (*_figures(state), *chain.from_iterable(api.figures for api in apis)):
        metrics.add(figure)
    routes = table(chain(STATUS_ROUTES, *(api.routes for api in apis)))
    return Assembly(state, apis, build(state, (*routes, *pages)))


def _figures(state: State) -> tuple[Figure, ...]:
    """Returns the gauges that every server has."""
    thread = state.engine
    adapters = state.engine.engine.adapters
    keys = state.keys
    return (
        Figure(
            "keys_unread_seconds",
            "For how long the file of keys could not be read.",
            lambda: keys.unread_seconds,
        ),
        Figure("waiting_rows", "Rows that wait for the engine.", lambda: thread.waiting),
        Figure("running_rows", "Rows that the engine runs.", lambda: thread.running),
        Figure("malformed_requests", "Bytes that were no HTTP.", lambda: Protocol.malformed),
        Figure("resident_adapters", "Adapters in memory.", lambda: len(adapters.digests)),
        Figure("resident_bytes", "The size of all adapters in memory.", lambda: adapters.nbytes),
    )
