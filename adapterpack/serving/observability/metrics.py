"""Prometheus metrics of a server: counters by adapter, latencies, and resident memory.

Label values are names of adapters in the engine. Names that requests make up never become series, since
clients could otherwise create any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..tenants import Quotas
from .audit import Record

MOST_ADAPTERS = 100
"""The most adapters with series of their own; further ones share ``OTHERS``."""
MOST_QUOTAS = 1000
"""The most quotas with series of their own: those with the highest use."""
TEXT_TYPE = "text/plain; version=0.0.4"
"""The media type of Prometheus's text format."""
OTHERS = "(others)"
BASE = "(base)"
MIXED = "(mixed)"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Figure(NamedTuple):
    """A gauge whose value is looked up whenever it is scraped."""

    name: str
    what: str
    value: Callable[[], float]


class Metrics:
    """The metrics of one server. ``figures`` are its gauges."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._adapters: set[str] = set()
        self.figures: list[Figure] = []
        self._requests = self._counter(
            "requests", "Requests by what answered and how they ended.", "adapter", "status"
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.", "adapter")
        self._answered = self._counter("generation_tokens", "Tokens of answers.", "adapter")
        self._refused = self._counter("refused", "Requests that were not worked on, by reason.", "code")
        self._changes = self._counter(
            "adapter_changes", "Adapters that were loaded, replaced, unloaded or refused.", "change", "reason"
        )
        self._first = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._each = self._histogram(
            "time_per_output_token_seconds", "Between the tokens of a row, on average over a request."
        )
        self._whole = self._histogram("request_seconds", "From a request's arrival to its end.")
        self._steps = self._histogram("engine_step_seconds", "Steps of the engine.")

    def add(self, figure: Figure) -> None:
        """Adds a gauge."""
        self.figures.append(figure)
        Gauge(f"adapterpack_{figure.name}", figure.what, registry=self._registry).set_function(figure.value)

    def add_quotas(self, quotas: Quotas) -> None:
        """Adds gauges for the quotas of keys."""
        self._registry.register(_QuotaSeries(quotas))

    def record_step(self, seconds: float, tokens: int) -> None:
        """Records the duration of an engine step."""
        self._steps.observe(seconds)

    def count_change(self, change: str, reason: str) -> None:
        """Counts a change of an adapter; ``reason`` is the error's code if it was refused."""
        self._changes.labels(change, reason).inc()

    def record(self, record: Record) -> None:
        """Records a request that has ended."""
        if record.rows == 0:
            if record.status >= 400:
                self._refused.labels(record.outcome).inc()
            return
        adapter = MIXED if record.mixed else self._label(record.adapter)
        self._requests.labels(adapter, str(record.status)).inc()
        self._prompt.labels(adapter).inc(record.prompt_tokens)
        self._answered.labels(adapter).inc(record.completion_tokens)
        if record.first:
            self._first.observe(record.first - record.started)
            self._whole.observe(record.last - record.started)
            more = record.completion_tokens / record.rows - 1
            if more > 0:
                self._each.observe((record.last - record.first) / more)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        text: bytes = generate_latest(self._registry)
        return text

    def _label(self, adapter: str | None) -> str:
        if adapter is None:
            return BASE
        if len(self._adapters) < MOST_ADAPTERS:
            self._adapters.add(adapter)
        return adapter if adapter in self._adapters else OTHERS

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"adapterpack_{name}", what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"adapterpack_{name}", what, buckets=_SECONDS, registry=self._registry)


class _QuotaSeries(Collector):
    """Collects the quotas of keys at every scrape."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas

    def collect(self) -> Iterator[Metric]:
        """Yields the series of the quotas with the highest use."""
        labels = ("key", "quota")
        limit = GaugeMetricFamily("adapterpack_quota_limit", "What a key may have.", labels=labels)
        used = GaugeMetricFamily("adapterpack_quota_used", "What a key has used of it.", labels=labels)
        refused = CounterMetricFamily(
            "adapterpack_quota_refused", "Requests that were refused for it.", labels=labels
        )
        for usage in self._quotas.usage()[:MOST_QUOTAS]:
            for family, value in ((limit, usage.limit), (used, usage.used), (refused, usage.refused)):
                family.add_metric((usage.key, usage.quota), value)
        yield from (limit, used, refused)
