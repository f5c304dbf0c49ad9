"""A server as a process: how it starts, which it refuses to be, how its keys change, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from click.testing import CliRunner
from processes import child
from servers import ANN, BOB, OLD, PROGRAM, WAIT, Served, begin, entry, waited, write_keys

from adapterpack.cli.main import main
from adapterpack.errors import ConfigError, NothingToDo, Unsupported
from adapterpack.serving.serve import serve
from adapterpack.serving.tenants.keys import Keys, read_keys

LONG = {"model": "alpha", "prompt": "x", "max_tokens": 300, "min_tokens": 300}


def streamed(server: Served, body: Any) -> Any:
    """The answer to a request, event by event."""
    return httpx.stream(
        "POST",
        f"{server.address}/v1/completions",
        json={**body, "stream": True},
        headers=server.headers,
        timeout=WAIT,
    )


def test_the_command(bundle: Path, packs: Path, tmp_path: Path) -> None:
    """``adapterpack serve`` says in one object where it is; Ctrl-C ends it with 130, and with nothing but the
    audit on standard error.
    """
    folder, key = tmp_path / "watched", tmp_path / "key"
    folder.mkdir()
    key.touch(0o600)
    key.write_text(ANN)
    args = [
        "serve",
        str(bundle),
        "--adapters",
        str(packs / "gamma"),
        "--adapters",
        f"delta={packs / 'alpha'}",
        "--port",
        "0",
        "--provider",
        "cpu",
        "--json",
        "--adapters",
        str(folder),
        "--watch",
        "0.5",
        "--admin",
        "127.0.0.1:0",
        "--admin-key-file",
        str(key),
        "--no-page",
        "--adapters",
        str(packs / "alpha"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "adapterpack", *args]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        jsonschema.validate(
            said, json.loads((Path(__file__).parents[2] / "schemas/report.v1.json").read_text("utf-8"))
        )
        assert sorted(said["adapters"]) == ["alpha", "beta", "delta", "gamma"]
        assert said["adapters"]["delta"] == said["adapters"]["alpha"]
        assert (
            httpx.get(
                f"{said['admin']}/v1/adapters", headers={"Authorization": f"Bearer {ANN}"}, timeout=WAIT
            ).status_code
            == 200
        )
        assert httpx.get(f"{said['address']}/", timeout=WAIT).status_code == 404
        body = {"model": "delta", "prompt": "x", "max_tokens": 2}
        assert httpx.post(f"{said['address']}/v1/completions", json=body, timeout=WAIT).status_code == 200
        rebound = httpx.post(
            f"{said['address']}/v1/completions", json=body, headers={"Host": "evil.example"}, timeout=WAIT
        )
        assert (rebound.status_code, rebound.json()["error"]["code"]) == (400, "wrong_host")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    *audited, last = errors.splitlines()
    assert last.startswith("interrupted")
    assert [json.loads(line)["status"] for line in audited] == [200, 200, 400]


def test_what_is_refused_before_it_starts(
    bundle: Path, packs: Path, bundle_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Others without a key; a file of keys that others may read, or that is none; a folder without adapters;
    a bundle without the graph.
    """
    with pytest.raises(ConfigError, match="without a key"):
        serve(bundle, host="0.0.0.0", port=0)
    keys = tmp_path / "keys"
    for text, match in (
        ("keys: {}", "expected"),
        ("keys: [{id: a, sha256: x}]", "regex|pattern"),
        ("keys: [{id: a}]", "sha256"),
        (json.dumps({"keys": [entry("a", "k"), entry("b", "k")]}), "same sha256"),
        (json.dumps({"keys": [entry("a", "k", adaptors=["x"])]}), "adaptors"),
        (json.dumps([entry("a", "k")]), 'begin the file with the line "keys:"'),
        (json.dumps({"keys": [entry("a", "k", expires="2020-01-01T00:00:00")]}), "zone"),
    ):
        keys.touch(0o600)
        keys.write_text(text)
        with pytest.raises(ConfigError, match=match):
            serve(bundle, keys=keys, port=0)
    keys.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read"):
        serve(bundle, keys=keys, port=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToDo, match="no adapter"):
        serve(bundle, adapters=[tmp_path / "empty"], port=0)
    with pytest.raises(Unsupported, match="no graph for the engine"):
        serve(bundle_of("llama", "bank"), port=0)
    keys.chmod(0o600)
    keys.write_text("keys:\n")
    for name in ("a b", "", "-a", "a" * 65, "a: 1"):
        done = CliRunner().invoke(main, ["serve", "--new-key", name])
        assert (done.exit_code, done.stdout) == (2, "") and "a key cannot have this id" in done.stderr
    # the last three are no texts in YAML unless they are quoted
    names = ["team-a", "team-b", "007", "no", "1e3"]
    for name in names:
        done = CliRunner().invoke(main, ["serve", "--new-key", name])
        with keys.open("a") as file:
            file.write(done.stdout)
        (key,) = re.findall(r"ap-[\w-]+", done.stderr)
        assert Keys(path=keys).of(f"Bearer {key}").id == name
        assert key not in keys.read_text()
    assert [(one.id, one.may("anything"), one.may(None)) for one in read_keys(keys)] == [
        (name, True, True) for name in names
    ]


def test_keys_change_and_the_server_ends_gently(start: Callable[..., Served], tmp_path: Path) -> None:
    """A key that leaves the file ends, one that comes begins, a file that is none changes nothing. On SIGTERM
    answers that were begun end as they would, whoever comes is told to come again, and the process ends with
    0.
    """
    keys = tmp_path / "keys"
    write_keys(keys, entry("ann", ANN, admin=True), entry("misspelt", OLD, adapters=["alhpa"]))
    server = start(keys=str(keys))

    def status(key: str) -> int:
        return server.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    assert (status(ANN), status(BOB)) == (200, 401)
    assert (
        "the key misspelt may ask for 'alhpa', and no adapter is called so: did you mean 'alpha'?"
        in server.log.read_text()
    )
    write_keys(keys, entry("bob", BOB), entry("ann", ANN))
    waited(lambda: status(BOB) == 200)
    keys.write_text("keys: 5")
    waited(lambda: status(ANN) == 200 and "the keys stay as they were" in server.log.read_text())
    assert status(ANN) == 200
    answers: list[Any] = []
    with (
        streamed(server, LONG) as stream,
        httpx.Client(base_url=server.address, headers=server.headers, timeout=WAIT) as kept,
    ):
        lines = stream.iter_lines()
        next(lines)
        thread = threading.Thread(
            target=lambda: answers.append(server.post("/v1/completions", {**LONG, "n": 16}))
        )
        with server.held():
            thread.start()
            waited(lambda: server.rows() == 1 + 16)
            assert kept.get("/ready").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            waited(lambda: kept.get("/ready").status_code == 503)
            refused = kept.post("/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        assert [line for line in lines if line][-1] == "data: [DONE]"
    thread.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 16 * 300
    assert server.process.wait(WAIT) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_file_of_keys_that_cannot_be_read_is_no_secret(
    start: Callable[..., Served], tmp_path: Path
) -> None:
    """The server says that it is degraded, without a path, and after a while lets nobody in, as revoked keys
    might be among them. An operator can still ask; once the file can be read, all is well.
    """
    keys, key = tmp_path / "keys", tmp_path / "operator"
    write_keys(keys, entry("ann", ANN, admin=True))
    key.touch(0o600)
    key.write_text(BOB)
    server = start(
        keys=str(keys), limits={"unread_keys_seconds": 2.0}, admin="127.0.0.1:0", admin_key_file=str(key)
    )

    def said(path: str, status: int, word: str) -> None:
        def text() -> str | None:
            answer = server.get(path)
            return answer.text if answer.status_code == status and word in answer.text else None

        assert str(tmp_path) not in waited(text)

    keys.write_text("keys: 5")
    said("/health", 200, '"degraded"')
    said("/v1/models", 503, "keys_unread")
    said("/ready", 503, "false")
    operator = httpx.get(f"{server.admin}/metrics", headers={"Authorization": f"Bearer {BOB}"}, timeout=WAIT)
    (unread,) = re.findall(r"^adapterpack_keys_unread_seconds (\S+)", operator.text, re.MULTILINE)
    assert float(unread) > 2
    write_keys(keys, entry("ann", ANN))
    said("/health", 200, '"ok"')
    said("/v1/models", 200, "base")


def test_who_takes_too_long_is_broken_off(start: Callable[..., Served]) -> None:
    """An answer that takes longer than a request may is 504, or an error in the stream; what is left when the
    drain's time is over ends with an error that names it; a stuck step is seen from outside.
    """
    server = start(limits={"request_seconds": 2.0, "drain_seconds": 0.2, "stuck_seconds": 0.0}, max_rows=64)
    body = {**LONG, "n": 8}
    with server.held():
        late = server.post("/v1/completions", body)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    waited(lambda: not server.rows())
    with server.held(), streamed(server, body) as stream:
        last = [line for line in stream.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    waited(lambda: not server.rows())
    with server.held(), streamed(server, body) as stream:
        health = waited(lambda: answer if (answer := server.get("/health")).status_code == 503 else None)
        server.process.send_signal(signal.SIGTERM)
        assert "error" in [line for line in stream.iter_lines() if line][-1]
    assert (health.status_code, health.json()["status"]) == (503, "stuck")
    assert re.search(r"a step of \d+ rows with the adapters alpha", health.json()["step"]), health.json()
    assert server.process.wait(WAIT) == 0


def test_a_second_signal_ends_it_at_once_and_quietly(start: Callable[..., Served]) -> None:
    """With streams that are being read, a request that waits and a connection without one: no traceback, and
    no answer is put an end to by an error in the log.
    """
    server = start(max_rows=4, limits={"first_seconds": 0.1})
    body = {**LONG, "n": 4, "max_tokens": 400, "min_tokens": 400}
    with ExitStack() as stack:
        threads = [threading.Thread(target=broken_off, args=(server, {**body, "n": 32})) for _ in range(3)]
        with server.held():
            for _ in range(3):
                stack.enter_context(streamed(server, body))
            for thread in threads:
                thread.start()
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            waited(lambda: server.rows() == 3 * 4 + 3 * 32)
        assert ended_by_two(server) == 0
    for thread in threads:
        thread.join()
    assert server.log.read_text() == ""


def ended_by_two(server: Served) -> int:
    """The exit code after a signal, which it takes some time to notice, and another."""
    server.process.send_signal(signal.SIGTERM)
    waited(lambda: server.get("/ready").status_code != 200)
    return server.ended(signal.SIGTERM)


def broken_off(server: Served, body: Any) -> None:
    with suppress(httpx.TransportError):
        assert server.post("/v1/completions", body).status_code in (200, 503)


def test_two_signals_end_a_server_whose_step_hangs(bundle: Path, tmp_path: Path) -> None:
    """The log says which step it was; the client whose answer it was making is not kept waiting."""
    hanging = (
        "import time\nfrom adapterpack.runtime.engine.engine import DecoderEngine\n"
        "DecoderEngine._decode = lambda self, events: time.sleep(1000)\n"
    )
    server = begin(bundle, tmp_path, program=hanging + PROGRAM, limits={"stuck_seconds": 0.5})
    thread = threading.Thread(target=broken_off, args=(server, LONG))
    try:
        thread.start()
        waited(lambda: "adapters alpha" in server.get("/health").text)
        assert ended_by_two(server) == 0
    finally:
        server.process.kill()
        thread.join()
    assert "the engine is given up in a step of 1 rows with the adapters alpha" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()
