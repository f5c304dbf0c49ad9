"""What the routes of a server share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .adapters.adapter_control import AdapterControl
from .catalogue import Catalogue
from .observability.audit import Record
from .observability.metrics import Metrics
from .observability.traffic import Traffic
from .scheduling.admission import Admission
from .scheduling.engine_thread import EngineThread
from .tenants.keys import Keys
from .tenants.limits import ServerLimits
from .tenants.quotas import Quotas


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
