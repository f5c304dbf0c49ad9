"""HAProxy before two servers, by the configuration in ``examples/serving``: requests for one adapter go to
one server.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from processes import child
from servers import Served

from adapterpack.cli.main import COMMANDS

CONFIG = Path(__file__).parents[2] / "examples" / "serving" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy")
NAMES = ("base", "alpha", "beta", "gamma")
TRIES = 6
needs_haproxy = pytest.mark.skipif(HAPROXY is None and not os.environ.get("CI"), reason="no HAProxy here")
"""As for a browser: it is left out where there is none, but in CI it fails."""


@pytest.mark.fast
def test_what_spreads_requests_over_servers_is_no_command_of_ours() -> None:
    """HAProxy, Envoy, Kubernetes and Ray do it; their recipes are in the guide."""
    assert "route" not in COMMANDS
    assert CONFIG.is_file()


@pytest.fixture
def balanced(start: Callable[..., Served]) -> Iterator[tuple[str, list[Served]]]:
    """Two servers without keys, a third address at which nobody answers, and HAProxy before them."""
    servers = [start(max_rows=4, keys=None) for _ in range(2)]
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as nobody:
        port, gone = free.getsockname()[1], nobody.getsockname()[1]
    addresses = [*(server.address.removeprefix("http://") for server in servers), f"127.0.0.1:{gone}"]
    variables = {f"ADAPTERPACK_SERVER_{number}": address for number, address in enumerate(addresses, 1)}
    command = [str(HAPROXY), "-db", "-q", "-f", str(CONFIG)]
    with child(
        command,
        env={**os.environ, **variables, "ADAPTERPACK_ADDRESS": f"127.0.0.1:{port}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ):
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 20
        while not answers(address):
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(2.5)  # the third has been asked, and is known to be down
        yield address, servers


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready").status_code == 200
    except httpx.TransportError:
        return False


def ask(address: str, name: str) -> None:
    """Asks for a model by each of its names: in a body, behind the base's name, beside a prompt too long to
    be looked at.
    """
    body = {"model": name, "prompt": "Order two mugs", "max_tokens": 2}
    for one in (
        body,
        {**body, "model": f"base:{name}"} if name != "base" else body,
        {**body, "prompt": "x " * 60_000},
    ):
        answer = httpx.post(f"{address}/v1/completions", json=one, timeout=120)
        assert answer.status_code == (200 if len(one["prompt"]) < 100 else 400), answer.text  # type: ignore[arg-type]
    for _ in range(TRIES):
        assert httpx.post(f"{address}/v1/completions", json=body, timeout=120).status_code == 200


def asked(server: Served) -> dict[str, int]:
    """Adapter -> how many requests for it a server has answered."""
    lines = [line["adapter"] or "base" for line in server.audited() if line["rows"]]
    return {name: lines.count(name) for name in NAMES if name in lines}


@pytest.mark.long
@needs_haproxy
def test_an_adapter_has_one_server(balanced: tuple[str, list[Served]]) -> None:
    """And the name of a page's host arrives as it was sent, so that a server refuses one that is not its
    own. When a server is killed, its
    adapters move to the other one."""
    address, servers = balanced
    for name in NAMES:
        ask(address, name)
    places = [asked(server) for server in servers]
    assert {name for place in places for name in place} == set(NAMES)
    assert sum(map(len, places)) == len(NAMES), places
    assert all(places), places
    assert httpx.get(f"{address}/v1/models", headers={"Host": "evil.example"}).status_code == 400
    servers[0].ended(signal.SIGKILL)
    time.sleep(3)
    for name in NAMES:
        ask(address, name)
    assert set(asked(servers[1])) == set(NAMES)
