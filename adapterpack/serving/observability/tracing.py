"""OpenTelemetry traces: one span for each request, with its key, adapter, token counts and times. Never
contains prompts or answers.

The standard variables ``OTEL_*`` configure destination and sampling. Needs the extra ``otel``.
"""

from __future__ import annotations

import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ...io import without_none
from ...version import VERSION
from .audit import Record


class Traces:
    """Sends spans to a collector by OTLP over HTTP, from a thread of its own."""

    def __init__(self) -> None:
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("adapterpack", VERSION)

    def record(self, record: Record) -> None:
        """Sends the span of a request that has ended, as part of the trace that its client named."""
        clock = time.time_ns() - time.monotonic_ns()

        def at(seconds: float) -> int:
            return clock + int(seconds * 1e9)

        method, _, path = record.route.partition(" ")
        given = {
            "http.request.method": method,
            "http.route": path,
            "http.response.status_code": record.status,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "adapterpack.request": record.id,
            "adapterpack.key": record.key,
            "adapterpack.adapter": record.adapter,
            "adapterpack.digest": record.digest,
            "adapterpack.rows": record.rows,
            "adapterpack.stream": record.stream,
            "adapterpack.outcome": record.outcome,
        }
        span = self._tracer.start_span(
            record.route,
            TraceContextTextMapPropagator().extract(record.trace),
            SpanKind.SERVER,
            without_none(given),
            start_time=at(record.started),
        )
        if record.first:
            span.add_event("first token", timestamp=at(record.first))
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, record.outcome))
        span.end(at(time.monotonic()))

    def close(self) -> None:
        """Sends the remaining spans."""
        self._provider.shutdown()


def _resource() -> Resource:
    """Returns the resource from the variables, with this package's name if they name no service."""
    resource = Resource.create({SERVICE_VERSION: VERSION})
    unnamed = str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service")
    return resource.merge(Resource({SERVICE_NAME: "adapterpack"})) if unnamed else resource
