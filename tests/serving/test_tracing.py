"""Traces: a span a request, in the trace that the client named, with who and what and how long, and nothing
of what was said.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from servers import ANN, BOB, Served

from adapterpack.errors import MissingExtra
from adapterpack.serving.serve import serve


class Collector(NamedTuple):
    """A collector of traces at an address, and the bodies that it was sent."""

    address: str
    bodies: list[bytes]


@pytest.fixture
def collector() -> Iterator[Collector]:
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Collector(f"http://127.0.0.1:{server.server_address[1]}", bodies)
        server.shutdown()


def test_a_span_a_request(
    start: Callable[..., Served], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, streamed and refused requests; those that were not sent yet are sent when the server ends."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.address)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    server = start(traces=True)
    trace, parent, secret = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "Xylophone"
    body = {"model": "gamma", "prompt": secret, "max_tokens": 3, "ignore_eos": True}
    headers = {**server.headers, "traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "first"}
    said = server.post("/v1/completions", body, headers=headers).json()["choices"][0]["text"]
    server.post(
        "/v1/completions", {**body, "stream": True}, headers={**server.headers, "traceparent": "nonsense"}
    )
    server.post("/v1/completions", body, headers={"Authorization": f"Bearer {BOB}"})
    server.get("/health")
    assert server.ended(signal.SIGTERM) == 0
    data = b"".join(collector.bodies)
    assert not any(word.encode() in data for word in (secret, said, ANN, BOB) if len(word) > 3)
    sent = [ExportTraceServiceRequest.FromString(one).resource_spans for one in collector.bodies]
    services = {
        item.value.string_value
        for one in sent
        for part in one
        for item in part.resource.attributes
        if item.key == "service.name"
    }
    assert services == {"shop"}
    first, streamed, refused = sorted(
        (span for one in sent for part in one for scope in part.scope_spans for span in scope.spans),
        key=lambda span: span.start_time_unix_nano,
    )
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (trace, parent)
    assert streamed.trace_id.hex() != trace and streamed.parent_span_id == b""
    given = [
        {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}
        for span in (first, streamed, refused)
    ]
    digest = server.adapters["gamma"]
    for values, is_stream in zip(given[:2], (False, True), strict=True):
        assert (
            values.items()
            >= {
                "http.route": "/v1/completions",
                "http.response.status_code": 200,
                "adapterpack.key": "ann",
                "adapterpack.adapter": "gamma",
                "adapterpack.digest": digest,
                "gen_ai.usage.output_tokens": 3,
                "adapterpack.stream": is_stream,
                "adapterpack.outcome": "length",
            }.items()
        )
        assert values["gen_ai.usage.input_tokens"] > 0
    assert given[0]["adapterpack.request"] == "first"
    assert (
        given[2].items()
        >= {
            "http.response.status_code": 404,
            "adapterpack.key": "bob",
            "adapterpack.outcome": "model_not_found",
        }.items()
    )
    for span in (first, streamed):
        [event] = span.events
        assert span.start_time_unix_nano < event.time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano - span.start_time_unix_nano < 20e9


def test_nothing_of_it_without_the_option(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without traces imports none of their libraries; with them it says which extra brings them."""
    code = (
        "import sys, adapterpack.serving.process, adapterpack.serving.serve, adapterpack.serving.api as "
        "api; list(api.APIS.values()); "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "adapterpack.serving.observability.tracing", raising=False)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtra, match=r"adapterpack\[otel\]"):
        serve(bundle, port=0, traces=True)
