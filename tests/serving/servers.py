"""A server of a test: its process, what it is asked and what it wrote down; its keys."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ANN, BOB, OLD = "ap-ann-ann-ann-ann-ann", "ap-bob-bob-bob-bob-bob", "ap-old-old-old-old-old"
"""Keys: of one who may have everything, of one who may have alpha alone, and one whose time is over."""
WAIT = 120.0
"""Seconds after which what a test waits for does not happen; a busy machine takes some."""


@dataclass
class Served:
    """A server that runs: its process, address, and what it wrote to standard error."""

    process: subprocess.Popen[str]
    address: str
    base: str
    adapters: dict[str, str]
    log: Path
    audit: Path
    hold: Path
    admin: str | None = None
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {ANN}"})
    heard: Callable[[httpx.Response], None] = lambda response: None  # what is done with every answer

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self._heard(
            httpx.get(self.address + path, **{"headers": self.headers, "timeout": WAIT, **options})
        )

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self._heard(
            httpx.post(
                self.address + path, json=body, **{"headers": self.headers, "timeout": WAIT, **options}
            )
        )

    def _heard(self, response: httpx.Response) -> httpx.Response:
        self.heard(response)
        return response

    def audited(self) -> list[dict[str, Any]]:
        """What it wrote of all requests that were answered; a line is written after its answer is sent, and
        before the next request is looked at.
        """
        with suppress(httpx.TransportError):
            httpx.get(f"{self.address}/health", timeout=WAIT)
        return [json.loads(line) for line in self.audit.read_text().splitlines()]

    def ended(self, sign: int, seconds: float = WAIT) -> int:
        self.process.send_signal(sign)
        return self.process.wait(seconds)

    @contextmanager
    def held(self, steps: int = 0) -> Iterator[None]:
        """While the block lasts the engine makes so many further steps at most, so that what was begun is not
        over, however fast the machine is.
        """
        self.hold.write_text(str(steps))
        try:
            yield
        finally:
            self.hold.unlink()

    def rows(self) -> int:
        """The answers that wait or run, of all keys."""
        said = self.get("/v1/status").json()
        return int(said["waiting"] + said["running"])


def waited(condition: Callable[[], Any], seconds: float = WAIT) -> Any:
    """What a condition gives once it holds."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.02)
    return value


PROGRAM = """
import json, sys, time
from adapterpack.http import bodies, protocol
from adapterpack.runtime.engine.engine import DecoderEngine
from adapterpack.serving.tenants.limits import ServerLimits
from adapterpack.serving.serve import serve
bundle, options = sys.argv[1], json.loads(sys.argv[2])
limits = ServerLimits(**options.pop("limits"))
bodies._DROP_SECONDS = protocol._DROP_SECONDS = 3.0
decode, made = DecoderEngine._decode, 0
def allowed():
    try:
        with open(sys.argv[3]) as file:
            return int(file.read() or 0)
    except FileNotFoundError:
        return None
def held(self, events):
    global made
    while (steps := allowed()) is not None and made >= steps:
        time.sleep(0.005)
    made = 0 if steps is None else made + 1
    decode(self, events)
DecoderEngine._decode = held
options.setdefault("port", 0)
serve(bundle, limits=limits, ready=lambda served: print(json.dumps(served[:4]), flush=True), **options)
"""
"""A server whose rows stand still while a file is there, and which listens for longer to a client that it has
refused: a busy machine may not send all for half a second.
"""


def entry(name: str, key: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), **more}


def write_keys(path: Path, *entries: dict[str, Any]) -> None:
    path.touch(0o600)
    path.write_text(json.dumps({"keys": entries}))


def begin(bundle: Path, folder: Path, program: str = PROGRAM, **options: Any) -> Served:
    """Starts a server of a bundle, by default with the keys above; ``folder`` is for what it writes. Who
    begins it ends its process.
    """
    if "keys" not in options:
        write_keys(
            folder / "keys",
            entry("ann", ANN, admin=True),
            entry("bob", BOB, adapters=["alpha"], base=False, max_rows=4),
            entry("old", OLD, expires="2020-01-01T00:00:00Z"),
        )
    given = {
        "keys": str(folder / "keys"),
        "audit": str(folder / "audit"),
        "provider": "cpu",
        "threads": 1,
        "name": "base",
        "max_rows": 4,
        "limits": {},
        **options,
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(bundle), json.dumps(given), str(folder / "hold")],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (folder / "log").read_text()
    address, base, adapters, admin = json.loads(line)
    return Served(process, address, base, adapters, folder / "log", folder / "audit", folder / "hold", admin)
