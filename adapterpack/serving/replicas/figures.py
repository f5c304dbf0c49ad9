"""What Prometheus reads of a router: how its requests went, and the series of all replicas, each with its address as a label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from .rendezvous import Replicas

Outcome = Literal["answered", "passed_on", "lost"]
"""A replica answered a request to its end; could not be reached or took none, so that the next one was asked; or ended in the middle."""
_LABEL = "replica"


class Figures:
    """The series of one router."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas, self._registry = replicas, CollectorRegistry()
        self._requests = Counter("adapterpack_routed_requests", "Requests by replica and how it took them.", (_LABEL, "outcome"),
                                 registry=self._registry)

    def count(self, address: str, outcome: Outcome) -> None:
        """A replica was asked."""
        self._requests.labels(address, outcome).inc()

    def text(self, said: Mapping[str, str]) -> bytes:
        """All series in Prometheus's text form; ``said`` is that of each replica that answers now, by its address."""
        whole: bytes = generate_latest(_Together(self._registry, self._replicas, said))
        return whole


class _Together(Collector):
    """The series of a router and of its replicas."""

    def __init__(self, own: CollectorRegistry, replicas: Replicas, said: Mapping[str, str]) -> None:
        self._own, self._replicas, self._said = own, replicas, said

    def collect(self) -> Iterator[Metric]:
        """The router's own first."""
        yield from self._own.collect()
        running = GaugeMetricFamily("adapterpack_routed_running", "Requests that a replica is answering.", labels=(_LABEL,))
        there = GaugeMetricFamily("adapterpack_replica_up", "Whether a replica answers now.", labels=(_LABEL,))
        for replica in self._replicas.all:
            running.add_metric((replica.address,), replica.running)
            there.add_metric((replica.address,), replica.address in self._said)
        yield from (running, there)
        families: dict[str, Metric] = {}
        for address, text in self._said.items():
            for family in text_string_to_metric_families(text):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [sample._replace(labels={**sample.labels, _LABEL: address}) for sample in family.samples]
        yield from families.values()
