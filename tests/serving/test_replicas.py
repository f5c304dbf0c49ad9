"""One address before three servers: who gets what, and what is lost when one is killed under load."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from processes import child
from prometheus_client.parser import text_string_to_metric_families
from servers import ANN, BOB, Served

from adapterpack import Session, route
from adapterpack.errors import ConfigError
from adapterpack.resources import schema
from adapterpack.serving.replicas.rendezvous import Replicas

NAMES: list[str | None] = [None, "alpha", "beta", "gamma"]
HEADERS = {"Authorization": f"Bearer {ANN}"}


@pytest.mark.fast
def test_names_keep_their_replica() -> None:
    """2,000 names: each replica has about a fifth; where one goes, its names alone move, to all others; where it is back, all are as
    before. A crowded one gives on what comes after, and the next time has it again."""
    replicas, names = Replicas([f"http://replica-{number}" for number in range(5)], pause=1e9, few=3), [f"name-{n}" for n in range(2_000)]
    first = {name: replicas.order(name)[0] for name in names}
    assert all(300 < count < 500 for count in Counter(first.values()).values())
    gone = replicas.all[2]
    replicas.failed(gone)
    moved = {name: replicas.order(name) for name in names}
    assert all(order[-1] is gone for order in moved.values())
    assert all((order[0] is first[name]) == (first[name] is not gone) for name, order in moved.items())
    assert len({order[0] for name, order in moved.items() if first[name] is gone}) == 4
    gone.gone_until = 0.0
    assert {name: replicas.order(name)[0] for name in names} == first
    busy = first["name-0"]
    busy.running = 3
    assert replicas.order("name-0")[0] is not busy
    assert replicas.order("name-0")[-1] is busy
    busy.running = 2
    assert replicas.order("name-0")[0] is busy


@pytest.mark.fast
@pytest.mark.parametrize("addresses", [[], ["127.0.0.1:8000"], ["ftp://a"], ["http://a/path"], ["http://a:1", "http://a:1/"]])
def test_what_are_no_replicas(addresses: list[str]) -> None:
    with pytest.raises(ConfigError):
        route(addresses, port=0)


@pytest.fixture
def routed(start: Callable[..., Served]) -> Iterator[tuple[str, list[Served]]]:
    """Three servers, and one address before them."""
    servers = [start(max_rows=4) for _ in range(3)]
    command = [sys.executable, "-m", "adapterpack", "route", *(server.address for server in servers), "--port", "0", "--few", "64",
               "--pause", "0.5", "--json"]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        Draft202012Validator(schema("report.v1")).validate(said)
        yield said["address"], servers
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


class Load:
    """Clients that ask for all adapters, whole and streamed, and compare each answer with what the adapter says alone."""

    def __init__(self, address: str, expected: dict[str, str]) -> None:
        self.address, self.expected, self.ending = address, expected, False
        self.done, self.failures, self.wrong = 0, list[tuple[float, str]](), list[str]()
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(8)]

    def _ask(self, number: int) -> None:
        names = list(self.expected)
        with httpx.Client(base_url=self.address, headers=HEADERS, timeout=30) as client:
            while not self.ending:
                number += 1
                name = names[number % len(names)]
                body = {"model": name, "prompt": "Order two mugs", "max_tokens": 16, "temperature": 0}
                try:
                    said = streamed(client, body) if number // 4 % 2 else whole(client, body)
                except (httpx.TransportError, RuntimeError) as error:
                    self.failures.append((time.monotonic(), repr(error)))
                else:
                    self.done += 1
                    if said != self.expected[name]:
                        self.wrong.append(f"{name}: {said}")

    def more(self, count: int) -> None:
        """Waits for so many answers more."""
        until, wanted = time.monotonic() + 60, self.done + count
        while self.done < wanted:
            assert time.monotonic() < until, self.failures[-3:]
            time.sleep(0.02)


def whole(client: httpx.Client, body: dict[str, Any]) -> str:
    answer = client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        raise RuntimeError(answer.text)
    return str(answer.json()["choices"][0]["text"])


def streamed(client: httpx.Client, body: dict[str, Any]) -> str:
    text, ended = "", False
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(line)
                text += "".join(choice["text"] for choice in event["choices"])
    if not ended:
        raise RuntimeError("the stream has no end")
    return text


def figures(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The series of a router."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(answer.text) for sample in family.samples}


def asked(server: Served) -> set[str | None]:
    return {record["adapter"] for record in server.audited() if record["status"] == 200 and record["rows"]}


@pytest.mark.long
def test_one_of_three_is_killed(routed: tuple[str, list[Served]], bundle: Path, packs: Path, start: Callable[..., Served]) -> None:
    """Under the load of eight clients each adapter is with one server. ``kill -9`` of one loses at most the requests that it was answering,
    its adapters move to the two others, and come back when it does; no answer is another adapter's."""
    address, servers = routed
    session = Session(bundle, "cpu")
    session.load(packs / "gamma")
    expected = {name or "base": session.generate([session.tokenizer.encode("Order two mugs")], name, max_new_tokens=16)[0].text
                for name in NAMES}
    assert len(set(expected.values())) == 4
    load = Load(address, expected)
    for thread in load.threads:
        thread.start()
    try:
        load.more(60)
        before = [asked(server) for server in servers]
        assert sorted(str(name) for names in before for name in names) == ["None", "alpha", "beta", "gamma"]
        assert not load.failures
        victim = max(range(3), key=lambda place: len(before[place]))
        servers[victim].ended(signal.SIGKILL)
        load.more(80)
        assert len(load.failures) <= 8
        others = set().union(*(asked(server) for place, server in enumerate(servers) if place != victim))
        assert others == set(NAMES)
        failures = len(load.failures)
        again = start(max_rows=4, port=servers[victim].port)
        load.more(80)
        deadline = time.monotonic() + 20
        while asked(again) != before[victim] and time.monotonic() < deadline:
            load.more(8)
        assert asked(again) == before[victim]
        assert len(load.failures) == failures
    finally:
        load.ending = True
        for thread in load.threads:
            thread.join(40)
    assert load.wrong == []


def test_no_target_leads_elsewhere() -> None:
    """A request that names another host where its path should be comes to a replica, or is refused: it goes nowhere else."""
    with socket.create_server(("127.0.0.1", 0)) as other, socket.create_server(("127.0.0.1", 0)) as replica:
        other.settimeout(0.1)
        replica.settimeout(10)
        place = f"127.0.0.1:{other.getsockname()[1]}"
        command = [sys.executable, "-m", "adapterpack", "route", f"http://127.0.0.1:{replica.getsockname()[1]}", "--port", "0", "--json"]
        with child(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            port = int(json.loads(process.stdout.readline())["address"].rpartition(":")[2])
            for target in (f"@{place}/", f"http://{place}/", f"//{place}/", f"/%2f%2f{place}/", "/../v1/models", "*", f"\\\\{place}"):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                    client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    if target.startswith("/"):
                        with replica.accept()[0] as taken:
                            assert taken.recv(5) == b"GET /"
                            taken.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    assert client.recv(12) == (b"HTTP/1.1 404" if target.startswith("/") else b"HTTP/1.1 400"), target
            with pytest.raises(TimeoutError):
                other.accept()


@pytest.mark.long
def test_what_is_passed_on(routed: tuple[str, list[Served]]) -> None:
    """Listings, refusals with their headers, the digest of what answered, and the metrics of all servers with the router's own, to an
    admin; readiness as long as one server is there, and 503 with Retry-After when none is. A client that goes away ends its rows."""
    address, servers = routed
    with httpx.Client(base_url=address, headers=HEADERS, timeout=30) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["base", "alpha", "beta", "gamma"]
        answer = client.post("/v1/completions", json={"model": "alpha", "prompt": "x", "max_tokens": 2}, headers={"X-Request-Id": "mine"})
        assert answer.headers["X-Adapterpack-Digest"] == servers[0].adapters["alpha"]
        assert answer.headers["X-Request-Id"] == "mine"
        assert client.post("/v1/completions", json={"model": "nobody", "prompt": "x"}).status_code == 404
        assert client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
        assert client.post("/v1/completions", content=b"x" * (5 << 20)).status_code == 413
        long = {"model": "alpha", "prompt": "x", "max_tokens": 400, "min_tokens": 400, "stream": True}
        with client.stream("POST", "/v1/completions", json=long) as stream:
            next(stream.iter_lines())
        deadline = time.monotonic() + 20
        while not any(record["outcome"] == "disconnected" for server in servers for record in server.audited()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        series = figures(client)
        addresses = {server.address for server in servers}
        assert {dict(labels)["replica"] for name, labels in series if name == "adapterpack_resident_adapters"} == addresses
        assert sum(value for (name, labels), value in series.items() if name == "adapterpack_generation_tokens_total") >= 2
        for server in servers[:2]:
            server.ended(signal.SIGKILL)
        assert {client.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 2}).status_code
                for name in ("base", "alpha", "beta", "gamma")} == {200}
        assert client.get("/ready").status_code == 200
        series = figures(client)
        assert {address: series["adapterpack_replica_up", (("replica", address),)] for address in addresses} == {
            server.address: float(server is servers[2]) for server in servers}
        outcomes = Counter({outcome: sum(value for (_, labels), value in series.items() if ("outcome", outcome) in labels)
                            for outcome in ("answered", "passed_on", "lost")})
        assert outcomes["answered"] >= 8 and outcomes["passed_on"] >= 1 and outcomes["lost"] == 0
        assert client.get("/metrics", headers={"Authorization": f"Bearer {BOB}"}).status_code == 403
        servers[2].ended(signal.SIGKILL)
        assert [client.get(path).status_code for path in ("/ready", "/metrics", "/health")] == [503, 503, 200]
        refused = client.post("/v1/completions", json={"model": "alpha", "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"], refused.headers["Retry-After"]) == (503, "no_replica", "1")
