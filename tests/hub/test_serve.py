"""``adapterpack hub serve`` as strangers use it: the plain ``hf`` command, a proxy, too large a body, Ctrl-C;
no token in any output.
"""

from __future__ import annotations

import json
import signal
import socketserver
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hubs import READ, WRITE, Hub, make_pack
from processes import child

import adapterpack
from adapterpack.errors import HubError, RepoNotFound, RevisionNotFound

pytestmark = pytest.mark.fast


def started(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A hub started by its command in an empty folder, with its output kept there, and its address."""
    tokens = folder / "tokens"
    tokens.write_text(f"ann write {WRITE}\nbob read {READ}\n")
    tokens.chmod(0o600)
    args = [
        "-m",
        "adapterpack",
        "hub",
        "serve",
        str(folder / "data"),
        "--port",
        "0",
        "--tokens",
        str(tokens),
        "--json",
    ]
    with (
        (folder / "log").open("w") as log,
        child([sys.executable, *args], stdout=subprocess.PIPE, stderr=log) as process,
    ):
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["address"]
    assert not any(token in (folder / "log").read_text() for token in (WRITE, READ))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one for several tests."""
    for _, address in started(tmp_path_factory.mktemp("served")):
        yield address


@pytest.fixture
def client(hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process, as a client of that one."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    return monkeypatch


def run(environment: dict[str, str], folder: Path, *command: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert not any(token in done.stdout + done.stderr for token in (WRITE, READ))
    return done.stdout


HF = ("-c", "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()")


def test_the_plain_hf_command_and_a_clean_end(
    hub: Hub, client_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf upload -> pull; push -> hf download; Ctrl-C ends the hub with nothing half-written."""
    pack = make_pack()
    pack.write(tmp_path / "pack")
    for process, address in started(tmp_path):
        monkeypatch.setenv("HF_ENDPOINT", address)
        environment = {**client_environment, "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
        run(environment, tmp_path, *HF, "upload", "ann/byhand", "pack", ".")
        assert adapterpack.pull("hf://ann/byhand").id == pack.id
        pushed = adapterpack.push(tmp_path / "pack", "hf://ann/pushed", tag="v1")
        run(
            environment, tmp_path, *HF, "download", "ann/pushed", "--revision", "v1", "--local-dir", "fetched"
        )
        assert (tmp_path / "fetched" / ".cache" / "huggingface").is_dir(), "the client's own notes"
        assert adapterpack.load(tmp_path / "fetched").id == pushed.id
        run({**environment, "HF_TOKEN": READ}, tmp_path, *HF, "upload", "ann/byhand", "pack", "more", code=1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) in {0, 130}
    assert [*(tmp_path / "data" / "tmp").rglob("*")] == [tmp_path / "data" / "tmp" / "parts"]
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_bodies_have_limits(address: str) -> None:
    url = f"{address}/api/repos/create"

    def endless() -> Iterator[bytes]:
        for _ in range(80):
            yield bytes(1 << 20)

    request = urllib.request.Request(
        url, data=endless(), method="POST", headers={"Authorization": f"Bearer {WRITE}"}
    )
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as caught:
        urllib.request.urlopen(request, timeout=120)
    assert getattr(caught.value, "code", 413) == 413


class Proxy(BaseHTTPRequestHandler):
    """An HTTP proxy: absolute addresses in, the origin's answer out."""

    seen: list[str] = []  # noqa: RUF012 - one list for all requests is what is wanted

    def forward(self) -> None:
        Proxy.seen.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        headers = {key: value for key, value in self.headers.items() if key != "Proxy-Connection"}
        request = urllib.request.Request(self.path, body, headers, method=self.command)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            answer: Any = opener.open(request)
        except urllib.error.HTTPError as error:
            answer = error
        data = answer.read()
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            if key.lower() not in {"transfer-encoding", "connection", "content-length"} or (
                key.lower() == "content-length" and self.command == "HEAD"
            ):
                self.send_header(key, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_HEAD = do_PUT = forward  # noqa: N815 - the standard library's names

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def test_a_proxy_is_used(client: pytest.MonkeyPatch) -> None:
    """HTTP_PROXY: every request of push and pull goes through it, with the hub under a name that only the
    proxy knows to be reachable.
    """
    from huggingface_hub.utils import close_session

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=partial(proxy.serve_forever, poll_interval=0.05), daemon=True).start()
        for name in ("no_proxy", "NO_PROXY"):
            client.delenv(name, raising=False)
        for name in ("http_proxy", "HTTP_PROXY"):
            client.setenv(name, f"http://127.0.0.1:{proxy.server_address[1]}")
        close_session()  # the next one reads the environment
        adapterpack.push(make_pack(), "hf://ann/proxied")
        pulled = adapterpack.pull("hf://ann/proxied")
        close_session()
        proxy.shutdown()
    assert pulled.id == make_pack().id
    assert any("/commit/main" in line for line in Proxy.seen)
    assert any(line.startswith("GET ") and line.endswith("/adapter_model.safetensors") for line in Proxy.seen)


def test_what_is_private_or_gone_has_an_error_of_its_name(client: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pushed, lock = (
        adapterpack.push(make_pack(), "hf://ann/secret", private=True),
        tmp_path / "adapterpack.lock",
    )
    for token in ("hf_" + "x" * 20, None):  # of nobody, and none
        with client.context() as stranger:
            stranger.delenv("HF_TOKEN") if token is None else stranger.setenv("HF_TOKEN", token)
            with pytest.raises(HubError if token else RepoNotFound) as caught:
                adapterpack.pull("hf://ann/secret", lock=lock)
            assert "hf_xxx" not in str(caught.value)
    assert not lock.exists()
    client.setenv("HF_TOKEN", READ)
    assert adapterpack.pull("hf://ann/secret", lock=lock).id == pushed.id
    with pytest.raises(RevisionNotFound):
        adapterpack.pull("hf://ann/secret@v9", lock=lock)
