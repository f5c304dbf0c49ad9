"""Adapters that come, change and go while a server runs: by an operator's requests, and by what lies in a
watched folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec.structs import replace
from servers import ANN, WAIT, Served, waited

import adapterpack
from adapterpack import load
from adapterpack.errors import AdapterpackError, ConfigError, StorageError, Unsigned
from adapterpack.pack.trust.sign import Signers
from adapterpack.runtime.engine.base import Engine
from adapterpack.serving.adapters.adapter_control import AdapterControl
from adapterpack.serving.adapters.adapter_source import InFolder, PackFolder
from adapterpack.serving.adapters.folder_watcher import FolderWatcher
from adapterpack.serving.serve import serve

OPERATOR = "operator-operator-operator"
BEARER = {"Authorization": f"Bearer {OPERATOR}"}


class Watched(NamedTuple):
    """A server, the folder that it watches, and its operator's address."""

    server: Served
    folder: Path
    operator: httpx.Client

    def change(self, what: str, **body: Any) -> httpx.Response:
        return self.operator.post(f"/v1/{what}_lora_adapter", json=body)

    def listed(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """The adapters by name, and why packs were refused by the names of their folders."""
        said = self.operator.get("/v1/adapters").json()
        return {one["name"]: one for one in said["adapters"]}, {
            one["source"]: one["reason"] for one in said["refused"]
        }

    def until(
        self, true: Callable[[dict[str, dict[str, Any]], dict[str, str]], object]
    ) -> dict[str, dict[str, Any]]:
        """Waits for what an operator sees to be so."""
        end = time.monotonic() + WAIT
        while not true(*self.listed()):
            assert time.monotonic() < end, self.listed()
            time.sleep(0.05)
        return self.listed()[0]

    def digest(self, model: str) -> str:
        """What answers a name."""
        answer = self.server.post("/v1/completions", {"model": model, "prompt": "x", "max_tokens": 2})
        return (
            answer.headers["x-adapterpack-digest"]
            if answer.status_code == 200
            else answer.json()["error"]["code"]
        )


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("operator") / "key"
    path.touch(0o600)
    path.write_text(OPERATOR + "\n")
    return path


@pytest.fixture(scope="module")
def watched(
    start: Callable[..., Served], packs: Path, key_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """A server that watches a folder in which gamma lies from the start."""
    folder = tmp_path_factory.mktemp("watched")
    shutil.copytree(packs / "gamma", folder / "gamma")
    server = start(adapters=[str(folder)], watch=0.1, admin="127.0.0.1:0", admin_key_file=str(key_file))
    assert server.admin is not None
    with httpx.Client(base_url=server.admin, headers=BEARER, timeout=120) as operator:
        yield Watched(server, folder, operator)


def named(folder: Path, name: str) -> adapterpack.Pack:
    """A pack that differs in its name."""
    return load(folder).renamed(name)


def test_an_operator_loads_exchanges_and_unloads(watched: Watched, packs: Path) -> None:
    """A pack of the folder gets a name, and with ``load_inplace`` a name another pack. A stream that was
    begun before ends as it would have and says its own digest; who asks later has the new one. Nothing but
    the name of a pack's folder names it.
    """
    digests = {name: load(packs / name).id for name in ("alpha", "beta", "gamma")}
    first = watched.change("load", lora_name="mine", lora_path="gamma")
    assert (first.status_code, first.json()["digest"], first.json()["generation"]) == (
        200,
        digests["gamma"],
        1,
    )
    assert watched.digest("mine") == digests["gamma"]
    (watched.folder / ".hidden").mkdir()
    shutil.copytree(packs / "beta", watched.folder / ".hidden" / "beta")
    shutil.copytree(packs / "alpha", watched.folder / ".alpha")
    cases = [
        ("mine", "gamma", 400, "name-taken"),
        ("base", "gamma", 400, "name-taken"),
        ("alpha", "gamma", 400, "name-taken"),
    ]
    cases += [
        ("new", path, 404, "unknown-adapter")
        for path in (
            str(packs / "beta"),
            "../packs/beta",
            "./gamma",
            "gamma/",
            ".hidden/beta",
            ".alpha",
            "hf://org/name",
            "beta\0",
            "..",
        )
    ]
    cases += [
        ("../new", "gamma", 400, "config"),
        ("new\n", "gamma", 400, "config"),
        ("", "gamma", 400, "invalid_request"),
    ]
    for name, path, status, code in cases:
        answer = watched.change("load", lora_name=name, lora_path=path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), (name, path)
        # what the operator can do
        assert code != "name-taken" or "load_inplace" in answer.json()["error"]["message"]
    long = {"model": "mine", "prompt": "x", "max_tokens": 250, "ignore_eos": True, "seed": 1}
    alone = watched.server.post("/v1/completions", long).json()
    with httpx.stream(
        "POST",
        f"{watched.server.address}/v1/completions",
        json={**long, "stream": True},
        headers=watched.server.headers,
        timeout=120,
    ) as stream:
        lines = stream.iter_lines()
        chunks = [next(lines)]
        shutil.copytree(packs / "beta", watched.folder / "beta-again")
        second = watched.change("load", lora_name="mine", lora_path="beta-again", load_inplace=True)
        assert (second.json()["digest"], second.json()["generation"]) == (digests["beta"], 2)
        assert watched.digest("mine") == digests["beta"]
        chunks += [line for line in lines if line]
    said = [json.loads(line.removeprefix("data: ")) for line in chunks if line and line != "data: [DONE]"]
    assert {chunk["system_fingerprint"] for chunk in said} == {digests["gamma"]}
    assert "".join(chunk["choices"][0]["text"] for chunk in said) == alone["choices"][0]["text"]
    gone = watched.change("unload", lora_name="mine")
    assert (gone.status_code, gone.json()["digest"]) == (200, digests["beta"])
    assert watched.change("unload", lora_name="mine").status_code == 404
    assert watched.digest("mine") == "model_not_found"
    shutil.rmtree(watched.folder / "beta-again")
    audited = [
        line
        for line in watched.server.audited()
        if line["route"] == "POST /v1/load_lora_adapter" and line["status"] == 200
    ]
    assert {(line["key"], line["adapter"]) for line in audited} == {("admin", "mine")}


def test_exchanges_under_load(watched: Watched, packs: Path) -> None:
    """While a name goes to and fro between two packs, six clients ask for it: each answer is word for word
    that of the digest it names.
    """

    def answer(model: str, number: int) -> tuple[str, str]:
        body = {
            "model": model,
            "prompt": f"Order {number} mugs",
            "max_tokens": 5,
            "temperature": 0,
            "ignore_eos": True,
        }
        said = watched.server.post("/v1/completions", body)
        assert said.status_code == 200, said.text
        return said.headers["x-adapterpack-digest"], said.json()["choices"][0]["text"]

    right = {(number, *answer(name, number)) for number in range(6) for name in ("beta", "gamma")}
    assert len({(number, text) for number, _, text in right}) == 12
    shutil.copytree(packs / "beta", watched.folder / "beta-again")
    assert watched.change("load", lora_name="swapped", lora_path="gamma").status_code == 200
    done, heard = threading.Event(), list[tuple[int, str, str]]()

    def ask(number: int) -> None:
        while not done.is_set():
            heard.append((number, *answer("swapped", number)))

    with ThreadPoolExecutor(6) as clients:
        said = [clients.submit(ask, number) for number in range(6)]
        try:
            for generation in range(2, 14):
                source = ("gamma", "beta-again")[generation % 2 == 0]
                swapped = watched.change("load", lora_name="swapped", lora_path=source, load_inplace=True)
                assert swapped.json()["generation"] == generation
                since, digest = len(heard), swapped.json()["digest"]
                waited(lambda since=since, digest=digest: digest in {one[1] for one in heard[since:]})
        finally:
            done.set()
        for one in said:
            one.result()
    assert set(heard) <= right
    assert watched.change("unload", lora_name="swapped").status_code == 200
    shutil.rmtree(watched.folder / "beta-again")


@pytest.mark.fast
def test_a_pack_is_taken_up_when_it_is_still(tmp_path: Path) -> None:
    """A pack is looked at once after two looks saw the same of it, and again after each change, or if it is
    worth another try; one that has gone, or is hidden, is none, and goes after another has taken its place; a
    folder that cannot be listed changes nothing.
    """
    root, pack = tmp_path / "root", tmp_path / "root" / "pack"
    calls: list[str] = []

    class Recorder:
        places = PackFolder(root).packs

        def follow(self, place: InFolder, leaving: set[InFolder]) -> bool:
            calls.append(f"follow {place.name}" + "".join(f" for {one.name}" for one in leaving))
            return place.name != "unreachable"

        def leave(self, place: InFolder) -> None:
            calls.append(f"leave {place.name}")

    def looks(count: int = 1) -> list[str]:
        calls.clear()
        for _ in range(count):
            watch.look()
        return list(calls)

    watch = FolderWatcher(Recorder())  # type: ignore[arg-type]
    pack.mkdir(parents=True)
    assert looks(3) == []
    (pack / "adapterpack.json").write_text("{}")
    for size in range(5):
        (pack / "tensors").write_text("x" * size)
        assert looks() == []
    assert looks() == ["follow pack"]
    assert looks(3) == []
    (pack / "tensors").write_text("yyyy")
    assert (looks(), looks(), looks(2)) == ([], ["follow pack"], [])
    (root / ".copying").mkdir()
    (root / ".copying" / "adapterpack.json").write_text("{}")
    root.rename(tmp_path / "away")
    assert looks(4) == []
    (tmp_path / "away").rename(root)
    pack.rename(root / "another")
    assert (looks(), looks(), looks(2)) == ([], ["follow another for pack", "leave pack"], [])
    (root / "another").rename(root / "unreachable")
    assert looks(3) == ["follow unreachable for another", "leave another", "follow unreachable"]
    shutil.rmtree(root / "unreachable")
    assert (looks(), looks(), looks(2)) == ([], ["leave unreachable"], [])


def test_only_the_operator_is_heard_and_only_there(watched: Watched) -> None:
    """Another key, a tenant's administrator's included, is none at the operator's address; the tenants'
    address knows no such routes.
    """
    body = {"lora_name": "mine", "lora_path": "gamma"}
    for authorization in ("", f"Bearer {ANN}", f"Basic {OPERATOR}", f"Bearer {OPERATOR}x"):
        headers = {"Authorization": authorization}
        for method, path in (
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/v1/unload_lora_adapter"),
            ("GET", "/v1/adapters"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
        ):
            answer = httpx.request(
                method, f"{watched.server.admin}{path}", json=body, headers=headers, timeout=120
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    for headers in (BEARER, watched.server.headers):
        for path in ("load_lora_adapter", "unload_lora_adapter"):
            assert watched.server.post(f"/v1/{path}", body, headers=headers).status_code == 404
        assert watched.server.get("/v1/adapters", headers=headers).status_code == 404
    assert watched.server.get("/v1/models", headers=BEARER).status_code == 401
    assert watched.operator.post("/v1/completions", json={"model": "alpha", "prompt": "x"}).status_code == 404
    assert "/v1/load_lora_adapter" in watched.operator.get("/openapi.json").json()["paths"]


def test_a_watched_folder(watched: Watched, packs: Path) -> None:
    """A pack that is dropped in is loaded once it is whole; one that changes is a new generation; one that is
    removed is unloaded. What is no pack, is altered, belongs elsewhere, has a taken name or is a link is
    refused with its reason, and what answered before goes on.
    """
    folder = watched.folder
    assert watched.listed()[0]["gamma"]["source"] == "gamma"
    first, second = named(packs / "alpha", "delta"), named(packs / "beta", "delta")
    first.write(folder / "delta")
    watched.until(lambda adapters, refused: "delta" in adapters)
    assert watched.digest("delta") == first.id
    shutil.rmtree(folder / "delta")
    second.write(folder / "delta")
    found = watched.until(lambda adapters, refused: adapters.get("delta", {}).get("digest") == second.id)
    assert found["delta"]["generation"] == 2
    assert watched.digest("delta") == second.id

    altered = folder / "delta" / "adapter_model.safetensors"
    whole = altered.read_bytes()
    altered.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    wrong = second.renamed("wrong")
    canary = wrong.manifest.canary
    assert canary is not None
    rows = tuple({**row, "logits": [value + 1.0 for value in row["logits"]]} for row in canary.adapter)
    dataclasses.replace(wrong, manifest=replace(wrong.manifest, canary=replace(canary, adapter=rows))).write(
        folder / "wrong"
    )
    named(packs / "alpha", "alpha").write(folder / "taken")
    named(packs / "alpha", "base").write(folder / "base")
    (folder / "link").symlink_to(packs / "beta")
    (folder / "none").mkdir()
    (folder / "none" / "adapterpack.json").write_text("{")
    (folder / "readme").mkdir()
    expected = {
        "delta": "format",
        "wrong": "parity",
        "taken": "name-taken",
        "base": "name-taken",
        "link": "format",
        "none": "format",
    }
    watched.until(lambda adapters, refused: refused == expected)
    assert watched.digest("delta") == second.id
    assert {card["id"] for card in watched.server.get("/v1/models").json()["data"]} == {
        "base",
        "alpha",
        "beta",
        "gamma",
        "delta",
    }
    text = watched.operator.get("/metrics").text
    assert 'adapterpack_adapter_changes_total{change="refused",reason="parity"} 1.0' in text
    assert 'adapterpack_adapter_changes_total{change="replaced",reason=""}' in text
    log = watched.server.log.read_text()
    for name, reason in expected.items():
        assert f"refused the pack {folder / name} ({reason})" in log

    for name in ("wrong", "taken", "base", "none", "delta"):
        shutil.rmtree(folder / name)
    (folder / "link").unlink()
    watched.until(lambda adapters, refused: not refused and "delta" not in adapters)
    assert watched.digest("delta") == "model_not_found"
    folder.rename(folder.with_name("away"))
    time.sleep(0.4)  # some looks
    assert "gamma" in watched.listed()[0]
    folder.with_name("away").rename(folder)


def test_signatures_and_a_socket_of_its_own(
    start: Callable[..., Served], packs: Path, key_file: Path, tmp_path: Path, bundle: Path
) -> None:
    """With ``require_signature`` a pack is loaded that one of the keys signed, and no other, at the start and
    later; the operator's socket in the file system is its owner's alone, and takes the place of one that a
    dead server left.
    """
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
    for number, key in enumerate(keys):
        (tmp_path / f"{number}.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (tmp_path / f"{number}.pub").write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
    folder = tmp_path / "packs"
    folder.mkdir()
    public = [str(tmp_path / "0.pub"), str(tmp_path / "1.pub")]
    for name, number in (("one", 0), ("two", 1), ("other", 2), ("unsigned", None)):
        named(packs / "gamma", name).write(folder / name)
        if number is not None:
            adapterpack.sign(folder / name, tmp_path / f"{number}.pem")
    with pytest.raises(Unsigned):
        serve(bundle, adapters=[folder / "unsigned"], require_signature=public, port=0)
    socket = tmp_path / "s"
    operated = {"require_signature": public, "admin": f"unix:{socket}", "admin_key_file": str(key_file)}
    server = start(adapters=[str(folder)], watch=0.1, **operated)
    assert sorted(server.adapters) == ["alpha", "beta", "one", "two"]
    with operator_at(socket) as operator:
        assert {one["source"]: one["reason"] for one in operator.get("/v1/adapters").json()["refused"]} == {
            "other": "wrongly-signed",
            "unsigned": "unsigned",
        }
        for source, reason in (("other", "wrongly-signed"), ("unsigned", "unsigned")):
            answer = operator.post("/v1/load_lora_adapter", json={"lora_name": source})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, reason)
    server.process.kill()
    server.process.wait(WAIT)
    assert socket.is_socket()
    (tmp_path / "empty").mkdir()
    server = start(adapters=[str(tmp_path / "empty")], **operated)
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    with operator_at(socket) as operator, pytest.raises(StorageError):
        assert operator.get("/ready").json() == {"ready": True}
        serve(bundle, port=0, admin=f"unix:{socket}", admin_key_file=key_file)
    assert server.ended(signal.SIGTERM) == 0
    assert not socket.exists()


def operator_at(socket: Path) -> httpx.Client:
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(socket)),
        base_url="http://operator",
        headers=BEARER,
        timeout=120,
    )


def test_what_an_operator_must_give(bundle: Path, key_file: Path, tmp_path: Path) -> None:
    """No address without a key, nor a key without an address; no key that others may read, or that is short;
    a folder to watch.
    """
    short, public = tmp_path / "short", tmp_path / "public"
    for path, text, mode in ((short, "operator", 0o600), (public, OPERATOR, 0o644)):
        path.touch(mode)
        path.write_text(text)
    (tmp_path / "file").touch()
    admin = "127.0.0.1:0"
    cases: list[tuple[dict[str, Any], type[AdapterpackError], str]] = [
        ({"admin": admin}, ConfigError, "address and a key"),
        ({"admin_key_file": key_file}, ConfigError, "address and a key"),
        ({"admin": admin, "admin_key_file": short}, ConfigError, "holds no key"),
        ({"admin": admin, "admin_key_file": public}, ConfigError, "others may read"),
        ({"admin": "127.0.0.1", "admin_key_file": key_file}, ConfigError, "not an address"),
        ({"admin": f"unix:{tmp_path / 'file'}", "admin_key_file": key_file}, StorageError, "in use"),
        ({"watch": 1.0}, ConfigError, "no folder to watch"),
        ({"require_signature": [key_file]}, ConfigError, "public key"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            serve(bundle, port=0, **options)
    assert (tmp_path / "file").is_file()


def test_who_looks_at_the_adapters_does_not_wait_for_a_load(
    bundle: Path, packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of a server looks: streams would stand still for as long as a pack is read and its canary is
    replayed.
    """
    engine = Engine(bundle, "cpu", max_rows=1)
    control = AdapterControl(
        engine.adapters, "base", [PackFolder(packs)], Signers(), lambda change, code: None
    )
    loading, go, read = threading.Event(), threading.Event(), engine.adapters._read

    def slowly(pack: Any) -> Any:
        loading.set()
        assert go.wait(2 * WAIT)
        return read(pack)

    monkeypatch.setattr(engine.adapters, "_read", slowly)
    with ThreadPoolExecutor(2) as threads:
        loaded = threads.submit(control.load, "gamma", "gamma")
        assert loading.wait(WAIT)
        try:
            names, refused = threads.submit(
                lambda: ([one.name for one in control.adapters], control.refused)
            ).result(WAIT)
        finally:
            go.set()
        assert (names, refused) == (["alpha", "beta"], [])
        assert loaded.result(WAIT).name == "gamma"
    assert [one.name for one in control.adapters] == ["alpha", "beta", "gamma"]
