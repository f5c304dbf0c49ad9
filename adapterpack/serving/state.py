"""The state that the routes of a server share, and the context of a request."""

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
    """The state of one server: its engine and models, its keys and limits, and its metrics and logs.

    ``ended`` are called for each request that has ended: metrics, audit log, traces. Without keys, ``hosts``
    are the names in the Host header that requests may use, against DNS rebinding; None permits any.
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
    """A request with the server's state, its key, and its record."""

    state: State
    request: Request
    key: Key
    record: Record

    async def read_body(self, kind: type[T]) -> T:
        """Parses the body into a struct.

        Raises:
            HTTPError: see :func:`.parsing.body`.
        """
        return await parsing.body(self.request, kind, self.state.limits)
