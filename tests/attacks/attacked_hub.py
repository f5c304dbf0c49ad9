"""A real hub in a process of its own, for strangers to attack."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import child

WRITE, READ = "hf_writerwriterwriterwriter", "hf_readerreaderreaderreader"
MIB = 1 << 20
PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from adapterpack.hub.server import serve
from adapterpack.http import bodies, protocol
protocol.HEAD_SECONDS = bodies.PAUSE_SECONDS = 1.0
serve.serve(sys.argv[1], port=0, tokens=sys.argv[2], ready=lambda address: print(address, flush=True))
"""
"""A hub that is as it is, but that its clients have a second where they have twenty or sixty, and that it may
open 1,024 files, as most processes may, on machines that allow more, too.
"""


@dataclass(frozen=True)
class Answer:
    """One answer as it came: status (0 for none), head and body."""

    status: int
    head: str
    body: bytes

    @property
    def code(self) -> str:
        """The name that clients know an error by."""
        match = re.search(r"(?im)^x-error-code: (.*?)\r?$", self.head)
        return match[1] if match else ""


@dataclass(frozen=True)
class Server:
    """A hub: where it is, its process, its folder and what it logs."""

    address: tuple[str, int]
    process: subprocess.Popen[str]
    folder: Path
    log: Path

    def raw(self, data: bytes, timeout: float = 120.0) -> Answer:
        """The answer to these bytes on a connection of their own."""
        with socket.create_connection(self.address, timeout=timeout) as connection:
            answer = bytearray()
            with suppress(OSError):  # it hung up, and may have said why
                connection.sendall(data)
            try:
                while more := connection.recv(1 << 16):
                    answer += more
            except ConnectionError:
                pass
        head, _, body = bytes(answer).partition(b"\r\n\r\n")
        return Answer(int(head.split()[1]) if head else 0, head.decode("latin-1"), body)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, object] = b"",
        token: str | None = WRITE,
        headers: tuple[str, ...] = (),
    ) -> Answer:
        """The answer to one request, written as it is here."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        host = () if any(header.lower().startswith("host:") for header in headers) else ("Host: hub",)
        lines = [f"{method} {path} HTTP/1.1", *host, "Connection: close", *headers]
        lines += [f"Content-Length: {len(data)}"] if data else []
        lines += [f"Authorization: Bearer {token}"] if token else []
        return self.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + data)

    def memory(self) -> int:
        """The most that the process ever had, in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    def files(self) -> int:
        """The files and connections that the process has open."""
        return len([*Path(f"/proc/{self.process.pid}/fd").iterdir()])

    def require_sound(self) -> None:
        """It answers, soon, and has logged no error since it was last looked at."""
        started = time.monotonic()
        assert self.ask("GET", "/api/whoami-v2").status == 200
        assert time.monotonic() - started < 60
        text = self.log.read_text()
        self.log.write_text("")
        assert "Traceback" not in text, text[-3000:]


def commit(*operations: dict[str, object], parent: object = None) -> bytes:
    header = {"key": "header", "value": {"summary": "s", "description": "", "parentCommit": parent}}
    return b"\n".join(json.dumps(line).encode() for line in (header, *operations))


def file(path: object, content: bytes = b"x") -> dict[str, object]:
    return {
        "key": "file",
        "value": {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"},
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "tokens").write_text(f"ann write {WRITE}\nbob read {READ}\n")
    (folder / "tokens").chmod(0o600)
    command = [sys.executable, "-c", PROGRAM, str(folder / "data"), str(folder / "tokens")]
    with (folder / "log").open("a") as log, child(command, stdout=subprocess.PIPE, stderr=log) as process:
        assert process.stdout is not None
        host, _, port = process.stdout.readline().strip().removeprefix("http://").partition(":")
        running = Server((host, int(port)), process, folder / "data", folder / "log")
        for name, private in (("open", False), ("hidden", True)):
            assert (
                running.ask(
                    "POST", "/api/repos/create", {"name": name, "organization": "org", "private": private}
                ).status
                == 200
            )
            assert (
                running.ask(
                    "POST", f"/api/models/org/{name}/commit/main", commit(file("a.json"), file("b/c.json"))
                ).status
                == 200
            )
        yield running


def answered(server: Server, answers: list[tuple[str, Answer]], least: int) -> None:
    """Each of them was an answer, and none an error of the server."""
    assert len(answers) >= least
    assert [(asked[:300], answer.head) for asked, answer in answers if not 200 <= answer.status < 500] == []
    assert [
        asked for asked, answer in answers if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", answer.head)
    ] == []
    server.require_sound()
