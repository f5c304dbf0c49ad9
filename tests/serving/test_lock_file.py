"""A lock file as the list of a server's adapters: what it pins is pulled from a real hub, compared, loaded
and followed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import child, reserved_port
from servers import WAIT, Served, waited

import adapterpack
from adapterpack import load
from adapterpack.errors import FormatError, HubError, NothingToDo, StorageError
from adapterpack.serving.adapters.adapter_source import LockFile
from adapterpack.serving.adapters.startup import StartupAdapters

TOKEN, OPERATOR = "hf_writerwriterwriterwriter", "operator-operator-operator"


@contextmanager
def hub_in(folder: Path, port: int) -> Iterator[str]:
    """Our own hub as a process; its address."""
    tokens = folder / "tokens"
    tokens.touch(0o600)
    tokens.write_text(f"ann write {TOKEN}\n")
    command = [
        sys.executable,
        "-m",
        "adapterpack",
        "hub",
        "serve",
        str(folder / "hub"),
        "--tokens",
        str(tokens),
        "--port",
        str(port),
        "--json",
    ]
    with child(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"]


@pytest.fixture
def port() -> Iterator[int]:
    """Where the hub is each time."""
    with reserved_port() as port:
        yield port


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process and the servers that it starts may use a hub, each with a cache of its own; this is the
    servers'.
    """
    from huggingface_hub import constants

    from adapterpack.hub.transport import client

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "own"))
    return tmp_path / "servers"


def published(pack: Path, name: str, folder: Path, reference: str) -> None:
    """A pack under another name, in a repository."""
    load(pack).renamed(name).write(folder)
    adapterpack.push(folder, reference, base_model="org/llama", license="apache-2.0")


@pytest.mark.long
def test_what_a_lock_file_pins_is_served(
    start: Callable[..., Served],
    packs: Path,
    tmp_path: Path,
    port: int,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the hub at the start, without it from the store; an update of the pin is a new generation; what
    the hub cannot give is refused and tried again, what has another digest is refused; an entry that goes is
    unloaded, and a lock file that goes changes nothing.
    """
    lock, other = tmp_path / "adapterpack.lock", tmp_path / "other.lock"
    key = tmp_path / "operator"
    key.touch(0o600)
    key.write_text(OPERATOR)
    with hub_in(tmp_path, port) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        published(packs / "alpha", "delta", tmp_path / "first", "hf://org/delta")
        published(packs / "gamma", "epsilon", tmp_path / "epsilon", "hf://org/epsilon")
        first = adapterpack.pull("hf://org/delta", lock=lock)
        adapterpack.pull("hf://org/epsilon", lock=other)
        with monkeypatch.context() as patch:
            patch.setenv("ADAPTERPACK_CACHE", str(cache))
            server = start(adapters=[str(lock)], watch=0.1, admin="127.0.0.1:0", admin_key_file=str(key))
        published(packs / "beta", "delta", tmp_path / "second", "hf://org/delta")
        operator = httpx.Client(
            base_url=server.admin or "", headers={"Authorization": f"Bearer {OPERATOR}"}, timeout=120
        )

        def until(true: Callable[[dict[str, Any], dict[str, str]], object]) -> dict[str, Any]:
            end = time.monotonic() + WAIT
            while True:
                said = operator.get("/v1/adapters").json()
                found = (
                    {one["name"]: one for one in said["adapters"]},
                    {one["source"]: one["reason"] for one in said["refused"]},
                )
                if true(*found):
                    return found[0]
                assert time.monotonic() < end, (found, server.log.read_text())
                time.sleep(0.05)

        def digest() -> str:
            answer = server.post("/v1/completions", {"model": "delta", "prompt": "x", "max_tokens": 2})
            assert answer.status_code == 200, answer.text
            return answer.headers["x-adapterpack-digest"]

        card = until(lambda adapters, refused: "delta" in adapters)["delta"]
        assert (card["digest"], card["source"], digest()) == (first.id, "hf://org/delta@main", first.id)
        second = adapterpack.pull("hf://org/delta", lock=lock, update=True)
        heard = set[str]()
        while second.id not in heard:
            heard.add(digest())  # the name is never missing
        assert heard <= {first.id, second.id}
        assert (
            until(lambda adapters, refused: adapters["delta"]["digest"] == second.id)["delta"]["generation"]
            == 2
        )
        for source, status in (
            ("hf://org/delta@main", 200),
            ("hf://org/epsilon@main", 404),
            ("org/epsilon", 404),
        ):
            given = {"lora_name": "mine", "lora_path": source}
            assert operator.post("/v1/load_lora_adapter", json=given).status_code == status

    pins, more = json.loads(lock.read_text()), json.loads(other.read_text())
    entries = {**pins["entries"], **more["entries"]}

    def write(**changes: dict[str, str]) -> None:
        changed = {
            name: {**entry, **changes.get(name.rpartition("/")[2].partition("@")[0], {})}
            for name, entry in entries.items()
        }
        lock.with_name("new").write_text(json.dumps({**pins, "entries": changed}))
        lock.with_name("new").rename(lock)

    write()
    until(lambda adapters, refused: refused == {"hf://org/epsilon@main": "hub"})
    assert digest() == second.id
    with hub_in(tmp_path, port):
        found = until(lambda adapters, refused: "epsilon" in adapters and not refused)
        assert found["epsilon"]["digest"] == more["entries"]["hf://org/epsilon@main"]["id"]
        assert server.log.read_text().count("refused the pack") == 1
        write(delta={"id": f"sha256:{'0' * 64}"})
        until(lambda adapters, refused: refused == {"hf://org/delta@main": "format"})
        assert digest() == second.id
    write()
    until(lambda adapters, refused: not refused)
    lock.rename(tmp_path / "away")
    waited(lambda: "there is no lock file" in server.log.read_text())
    assert digest() == second.id
    lock.write_text(json.dumps({**pins, "entries": more["entries"]}))
    until(lambda adapters, refused: not {"delta", "mine"} & adapters.keys() and "epsilon" in adapters)
    with monkeypatch.context() as patch:
        patch.setenv("ADAPTERPACK_CACHE", str(cache))
        [(_, pack)] = LockFile(lock).at_start()
    assert pack.id == more["entries"]["hf://org/epsilon@main"]["id"]
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "empty"))
    with pytest.raises(HubError):
        list(LockFile(lock).at_start())
    operator.close()


@pytest.mark.fast
def test_what_is_no_list_of_adapters(tmp_path: Path) -> None:
    """A file that is something else; a lock file of bundles alone, or of nothing; none at all."""
    lock = tmp_path / "adapterpack.lock"

    def given(text: str) -> StartupAdapters:
        lock.write_text(text)
        return StartupAdapters.of([lock])

    control: Any = None
    empty = {"format": "adapterpack.lock", "version": 1, "entries": {}}
    bundle = {"hf://org/bundle@main": {"commit": "0" * 40, "kind": "bundle", "id": f"sha256:{'0' * 64}"}}
    with pytest.raises(FormatError):
        given("{").load(control, changing=False, watched=False)
    for entries in ({}, bundle):
        one = given(json.dumps({**empty, "entries": entries}))
        with pytest.raises(NothingToDo, match=r"adapterpack\.lock"):
            one.load(control, changing=False, watched=False)
        one.load(control, changing=True, watched=True)
    lock.unlink()
    with pytest.raises(StorageError):
        LockFile(lock).packs()
