"""``/v1/status``: what a key may see of a server: its own traffic and its adapters, or everything with an
operator's key.

Only operators see how much of prompts was cached and which adapters are in memory, because both reveal what
others asked.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from ..pack.inspect import summary
from ..pack.pack import Pack
from ..runtime.open_bundle import OpenBundle
from ..version import VERSION
from .adapters.adapter_control import Refusal, ServedAdapter
from .admin import RefusalCard, time_of
from .catalogue import ServedModel
from .observability.traffic import Counts, Tally, Wait
from .route import RouteSpec, json_response
from .state import RequestContext, State
from .tenants.keys import EVERYBODY, Key


class Facts(msgspec.Struct, frozen=True):
    """A summary of a pack: its method, the smallest and largest rank of its sites, the number of sites, their
    modules, and its bytes.
    """

    method: str
    ranks: tuple[int, int] | None
    sites: int
    modules: list[str]
    bytes: int


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
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


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
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


class ModelStatusList(msgspec.Struct, frozen=True):
    """The base and the adapters that the key may name; for an operator all of them, and the packs that were
    refused.
    """

    models: list[ModelStatus]
    refused: list[RefusalCard] | UnsetType = UNSET


class StatusRoutes:
    """The status routes of one server."""

    def __init__(self) -> None:
        self._facts: dict[str, Facts] = {}
        """Digest -> the summary of a pack, computed once."""

    async def status(self, context: RequestContext) -> Response:
        """``GET /v1/status``: returns the traffic of the key, or of all keys."""
        tally = _tally(context.state, context.key)
        return json_response(
            ServerStatus(
                version=VERSION,
                base=context.state.catalogue.base,
                of="all" if context.key.admin else "key",
                key=context.key.id,
                time=context.state.traffic.clock(),
                waiting=tally.waiting,
                running=tally.running,
                counts=tally.counts,
                wait=tally.wait,
                engine={figure.name: figure.value() for figure in context.state.metrics.figures}
                if context.key.admin
                else UNSET,
            )
        )

    async def models(self, context: RequestContext) -> Response:
        """``GET /v1/status/models``: lists models with their packs and traffic. Summarizing a thousand packs
        for the first time takes a moment, so it runs on another thread.
        """
        models = await asyncio.to_thread(
            self._models, context.state, context.key, _tally(context.state, context.key)
        )
        return json_response(
            ModelStatusList(
                models,
                [_refusal_card(one) for one in context.state.adapters.refused]
                if context.key.admin
                else UNSET,
            )
        )

    def _models(self, state: State, key: Key, tally: Tally) -> list[ModelStatus]:
        adapters = {one.name: one for one in state.adapters.adapters}
        for digest in set(self._facts) - {one.digest for one in adapters.values()}:
            self._facts.pop(digest, None)
        resident = set(state.engine.engine.adapters.digests) if key.admin else None
        bundle = state.engine.engine.bundle
        return [
            self._model(bundle, model, adapters.get(model.name), tally, resident)
            for model in state.catalogue.visible(EVERYBODY if key.admin else key)
        ]

    def _facts_of(self, pack: Pack) -> Facts:
        facts = self._facts.get(pack.id)
        if facts is None:
            facts = self._facts[pack.id] = _facts(pack)
        return facts

    def _model(
        self,
        bundle: OpenBundle,
        model: ServedModel,
        adapter: ServedAdapter | None,
        tally: Tally,
        resident: set[str] | None,
    ) -> ModelStatus:
        headless = bool(bundle.task.heads) and not bundle.head(model.pack).trained
        counts = tally.of(model.adapter)
        if not isinstance(model.pack, Pack) or adapter is None:
            return ModelStatus(name=model.name, digest=model.digest, headless=headless, counts=counts)
        return ModelStatus(
            name=model.name,
            digest=model.digest,
            headless=headless,
            counts=counts,
            adapter=self._facts_of(model.pack),
            generation=adapter.generation,
            loaded=time_of(adapter.loaded),
            resident=UNSET if resident is None else model.digest in resident,
        )

    def table(self) -> tuple[RouteSpec, ...]:
        """Returns the routes. They are quiet, so that polling does not fill the audit log."""
        return (
            RouteSpec(
                "GET",
                "/v1/status",
                self.status,
                "key",
                "the traffic of the key, or of all",
                None,
                ServerStatus,
                quiet=True,
            ),
            RouteSpec(
                "GET",
                "/v1/status/models",
                self.models,
                "key",
                "base and adapters with what they are and had",
                None,
                ModelStatusList,
                quiet=True,
            ),
        )


def _tally(state: State, key: Key) -> Tally:
    return state.traffic.all if key.admin else state.traffic.of(key.id)


def _refusal_card(refusal: Refusal) -> RefusalCard:
    """Returns a refusal without paths of this machine."""
    message = refusal.message.replace(str(refusal.place), refusal.place.name)
    return RefusalCard(refusal.place.name, refusal.reason, message, time_of(refusal.time))


def _facts(pack: Pack) -> Facts:
    known = summary(pack)
    ranks = [group.rank for group in pack.manifest.groups if group.rank is not None]
    saved = [path.rpartition(".")[2] for path in known["modules_to_save"]]
    return Facts(
        " + ".join([known["method"], *known.get("beside", ())]),
        (min(ranks), max(ranks)) if ranks else None,
        known["sites"],
        list(dict.fromkeys([*known["sites_by_module"], *saved])),
        known["bytes"],
    )
