"""HAProxy before two servers, by the configuration in ``examples/serving``: requests for one adapter go to
one server.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from processes import child, reserved_port
from servers import Served, waited

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
def balanced(start: Callable[..., Served], tmp_path: Path) -> Iterator[Balanced]:
    """Two servers without keys, a third address at which nobody answers, and HAProxy before them."""
    servers = [start(max_rows=4, keys=None) for _ in range(2)]
    (tmp_path / "states.cfg").write_text(f"global\n  stats socket {tmp_path}/states\n")
    with reserved_port() as port, reserved_port() as gone:
        addresses = [*(server.address.removeprefix("http://") for server in servers), f"127.0.0.1:{gone}"]
        variables = {f"ADAPTERPACK_SERVER_{number}": address for number, address in enumerate(addresses, 1)}
        command = [str(HAPROXY), "-db", "-q", "-f", str(CONFIG), "-f", str(tmp_path / "states.cfg")]
        with child(
            command,
            env={**os.environ, **variables, "ADAPTERPACK_ADDRESS": f"127.0.0.1:{port}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ):
            known = Balanced(f"http://127.0.0.1:{port}", servers, tmp_path / "states")
            waited(lambda: known.up() == ["one", "two"])
            yield known


class Balanced(NamedTuple):
    """HAProxy's address, the servers behind it, and its socket for operators."""

    address: str
    servers: list[Served]
    states: Path

    def up(self) -> list[str] | None:
        """The servers that it knows to answer; none before it listens."""
        with socket.socket(socket.AF_UNIX) as operator, suppress(OSError):
            operator.connect(str(self.states))
            operator.sendall(b"show stat -1 4 -1\n")
            rows = csv.DictReader(operator.makefile())
            return [row["svname"] for row in rows if row["status"] == "UP"]
        return None


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
def test_an_adapter_has_one_server(balanced: Balanced) -> None:
    """And the name of a page's host arrives as it was sent, so that a server refuses one that is not its
    own. When a server is killed, its
    adapters move to the other one."""
    address, servers, _ = balanced
    for name in NAMES:
        ask(address, name)
    places = [asked(server) for server in servers]
    assert {name for place in places for name in place} == set(NAMES)
    assert sum(map(len, places)) == len(NAMES), places
    assert all(places), places
    assert httpx.get(f"{address}/v1/models", headers={"Host": "evil.example"}, timeout=120).status_code == 400
    servers[0].ended(signal.SIGKILL)
    waited(lambda: balanced.up() == ["two"])
    for name in NAMES:
        ask(address, name)
    assert set(asked(servers[1])) == set(NAMES)
