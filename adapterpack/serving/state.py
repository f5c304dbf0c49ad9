"""What the routes of a server share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from starlette.requests import Request

from ..io.typed_json import StrictStruct
from . import parsing
from .adapters.adapter_control import AdapterControl
from .catalogue import Catalogue
from .observability.audit import Record
from .observability.metrics import Metrics
from .observability.traffic import Traffic
from .scheduling.admission import Admission
from .scheduling.engine_thread import EngineThread
from .tenants.keys import Key, Keys
from .tenants.limits import ServerLimits
from .tenants.quotas import Quotas

T = TypeVar("T", bound=StrictStruct)


@dataclass(frozen=True)
class State:
    """One server: its engine and models, who may ask, and what it counts and writes down.

    ``ended`` are those who hear of each request that has ended: metrics, audit, traces. ``hosts`` are the
    names by which browsers may call it, where there are no keys; None for any.
    """

    engine: EngineThread
    catalogue: Catalogue
    adapters: AdapterControl
    admission: Admission
    keys: Keys
    quotas: Quotas
    limits: ServerLimits
    metrics: Metrics
    ended: Sequence[Callable[[Record], None]]
    traffic: Traffic
    hosts: frozenset[str] | None = None


class RequestContext(NamedTuple):
    """A request, the server that it came to, whose it is, and what is recorded of it."""

    state: State
    request: Request
    key: Key
    record: Record

    async def read_body(self, kind: type[T]) -> T:
        """The struct in the body.

        Raises:
            HTTPError: as :func:`.parsing.body`.
        """
        return await parsing.body(self.request, kind, self.state.limits)
