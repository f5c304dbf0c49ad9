"""A hub that attacks its clients: its answers are whatever a test decides, and the command line meets it in a
process of its own.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from attack import SECRET, Attacks, Outcome

COMMIT = "0123456789" * 4
MIB = 1 << 20
PACK = b'{"format": "adapterpack"}'


class Host(ThreadingHTTPServer):
    """A hub, or another host, whose answers a test decides; it notes the authorization of every request."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.port = self.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.answers: dict[str, Callable[[Request], None]] = {}
        self.seen: list[tuple[str, str | None]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what is wanted."""


class Request(BaseHTTPRequestHandler):
    """One request: answered by the first answer whose word is in its path, else as a sound hub with one
    repository would.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Host

    def answer(self) -> None:
        self.server.seen.append((f"{self.command} {self.path}", self.headers.get("Authorization")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for word, act in self.server.answers.items():
            if word in self.path:
                act(self)
                return
        if "/revision/" in self.path:
            self.say({"sha": COMMIT, "id": "org/name"})
        elif "/tree/" in self.path:
            self.say([entry("adapterpack.json", PACK)])
        elif "/resolve/" in self.path:
            self.say(data=PACK, X_Repo_Commit=COMMIT)
        else:
            self.say({}, 404, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - the standard library's names

    def say(self, value: Any = None, status: int = 200, data: bytes | None = None, **headers: str) -> None:
        """A whole answer."""
        body = json.dumps(value).encode() if data is None else data
        self.begin(status, **{"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: int = 200, **headers: str) -> None:
        """The head of an answer."""
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def entry(path: Any, data: bytes = b"{}", **more: Any) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": git, **more}


def running() -> Iterator[Host]:
    with Host() as host:
        threading.Thread(target=partial(host.serve_forever, poll_interval=0.02), daemon=True).start()
        yield host
        host.shutdown()


@pytest.fixture(scope="module")
def _hub() -> Iterator[Host]:
    yield from running()


@pytest.fixture(scope="module")
def _other() -> Iterator[Host]:
    yield from running()


@pytest.fixture
def hub(_hub: Host) -> Host:
    _hub.answers, _hub.seen = {}, []
    return _hub


@pytest.fixture
def other(_other: Host) -> Host:
    _other.answers, _other.seen = {"": lambda request: request.say([])}, []
    return _other


def impatient(address: str, *arguments: str) -> int:
    """The command line as a client of this hub, with waits of a tenth of those that users have."""
    import os

    from attack import _command
    from huggingface_hub import constants

    from adapterpack.hub.transport import client, http

    os.environ |= {"HF_ENDPOINT": address, "ADAPTERPACK_CACHE": str(Path.cwd() / "cache")}
    os.environ.pop("HF_HUB_OFFLINE", None)
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DOWNLOAD_TIMEOUT = False, 1.5  # type: ignore[assignment]
    constants.HF_HUB_CACHE = str(Path.cwd() / "models")
    client._FIRST_WAIT = client._LONGEST_WAIT = 0.01  # type: ignore[misc]
    http._GRACE = 1.0  # type: ignore[misc]
    return _command(list(arguments), "")


def pull(attacks: Attacks, hub: Host, *arguments: str) -> Outcome:
    """``adapterpack pull`` from that hub; whatever it is answered, no other host hears the token, and no
    cache holds it.
    """
    outcome = attacks.call(impatient, hub.address, *(arguments or ("pull", "hf://org/name", "-o", "out")))
    for path in attacks.work.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    return outcome
