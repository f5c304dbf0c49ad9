"""Packs in registries of containers: a real one (Debian's docker-registry, 2.8), which knows no referrers, and another
client (skopeo).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hubs import left, make_pack
from huggingface_hub import constants
from jsonschema import Draft202012Validator
from registries import HTPASSWD, Registry, copied, log_in, running

import adapterpack
from adapterpack.errors import AdapterpackError, ConfigError, FormatError, HubError, RepoNotFound, Revoked
from adapterpack.hub.transport.registry import MAX_LAYERS, MAX_READ, parse_address

Altered = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def registry(served: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry, asked by this process with a fresh cache and nobody's login."""
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    served.fetched()
    return served


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public half."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, info))
    return private, public


def written(tmp_path: Path, **claims: Any) -> Path:
    folder = make_pack("tickets", **claims).write(tmp_path / "tickets").path
    assert folder is not None
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(*words: object) -> tuple[int, str]:
    """The exit code and the output of a command that may not use the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-m", "adapterpack", *map(str, words)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_pack_is_pushed_and_pulled_by_digest_by_us_and_by_another_client(
    registry: Registry, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """Both get the same files. The signature and the bill of materials are attached to the manifest."""
    pack, (private, public) = written(tmp_path), keys
    adapterpack.sign(pack, private)
    pushed = adapterpack.push(pack, registry.address("tickets") + ":v1")
    pulled = adapterpack.pull(f"{registry.address('tickets')}@{pushed.commit}", tmp_path / "ours")
    assert contents(pulled.path) == contents(pack)
    assert (pulled.id, pulled.commit) == (pushed.id, pushed.commit)

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    manifest = copied(registry, "tickets", str(pushed.commit), theirs)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    kinds = {one["annotations"]["org.cncf.model.filepath"]: one["mediaType"] for one in manifest["layers"]}
    assert kinds["adapter_model.safetensors"] == "application/vnd.cncf.model.weight.v1.raw"
    attached = registry.referrers("tickets", str(pushed.commit))
    copied(registry, "tickets", attached["application/vnd.dev.sigstore.bundle.v0.3+json"], theirs)
    assert contents(theirs) == contents(pack)
    assert command("verify", theirs, "--key", public)[0] == 0
    assert command("validate", theirs)[0] == 0
    copied(registry, "tickets", attached["application/vnd.cyclonedx+json"], tmp_path)
    assert json.loads((tmp_path / "bom.cdx.json").read_bytes()) == adapterpack.bom(pack)


def test_the_configuration_has_the_fields_of_the_specification(registry: Registry, tmp_path: Path) -> None:
    """Those of its schema's ``config-schema.json``, 0.0.7, that must be there, and no other."""
    pushed = adapterpack.push(written(tmp_path), registry.address("fields"))
    manifest = registry.manifest(str(pushed.commit))
    config = registry.manifest(manifest["config"]["digest"])
    text = {"type": "string"}
    shape = {"type": {"const": "layers"}, "diffIds": {"type": "array", "items": text, "minItems": 1}}
    Draft202012Validator(
        {
            "properties": {
                "descriptor": {"properties": {"name": text}, "additionalProperties": False},
                "config": {"properties": {"format": text}, "additionalProperties": False},
                "modelfs": {"properties": shape, "required": [*shape], "additionalProperties": False},
            },
            "required": ["descriptor", "config", "modelfs"],
            "additionalProperties": False,
        }
    ).validate(config)
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in manifest["layers"]]


def test_equal_content_is_sent_once_and_a_lock_file_pins_the_digest(
    registry: Registry, tmp_path: Path
) -> None:
    address, lock = registry.address("moved"), tmp_path / "lock"
    first = adapterpack.push(written(tmp_path / "one"), address)
    again = adapterpack.push(tmp_path / "one" / "tickets", address, dry_run=True)
    assert not again.sent and again.commit == first.commit
    assert adapterpack.pull(address, lock=lock).id == first.id
    second = adapterpack.push(written(tmp_path / "two", seed=8), address)
    assert adapterpack.pull(address, lock=lock).id == first.id
    assert adapterpack.pull(address, lock=lock, update=True).id == second.id
    assert adapterpack.pull(address, tmp_path / "three").commit == second.commit


def test_a_later_signature_is_the_one_that_is_pulled(
    registry: Registry, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    pack, (private, public) = written(tmp_path), keys
    for identity in ("first", "second"):
        adapterpack.sign(pack, private, identity=identity)
        adapterpack.push(pack, registry.address("signed"))
        signature = pack / "adapterpack.sig.json"
        data = signature.read_bytes()
        signature.unlink()
    adapterpack.pull(registry.address("signed"), tmp_path / "pulled")
    assert (tmp_path / "pulled" / "adapterpack.sig.json").read_bytes() == data
    assert adapterpack.verify(tmp_path / "pulled", public).identity == "second"


@pytest.mark.parametrize("others", [1, MAX_READ])
def test_a_signature_is_found_where_a_registry_does_not_list_its_type(
    others: int, registry: Registry, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """Among so many manifests as may be read in search of it, and no more: there are the others, too."""
    pack, name = written(tmp_path, seed=others), f"untyped{others}"
    adapterpack.sign(pack, keys[0])
    pushed = adapterpack.push(pack, registry.address(name))
    tag = str(pushed.commit).replace(":", "-")
    attached = registry.referrers(name, str(pushed.commit))
    kinds = ["application/vnd.dev.sigstore.bundle.v0.3+json", *["application/vnd.cyclonedx+json"] * others]
    listed = [
        {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/vnd.oci.empty.v1+json",
            "digest": attached[kind],
            "size": registry.blob(attached[kind]).stat().st_size,
        }
        for kind in kinds
    ]
    index = "application/vnd.oci.image.index.v1+json"
    registry.put(name, tag, {"schemaVersion": 2, "mediaType": index, "manifests": listed})
    adapterpack.pull(registry.address(name), tmp_path / "pulled")
    assert (tmp_path / "pulled" / "adapterpack.sig.json").exists() == (others < MAX_READ)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapterpack.json", "adapterpack.sig.json"])
def test_a_blob_that_was_altered_in_the_registry_is_refused(
    name: str, registry: Registry, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """Whichever file it is; nothing of the pack is kept."""
    pack, repository = written(tmp_path, seed=len(name)), f"altered{len(name)}"
    adapterpack.sign(pack, keys[0])
    pushed = adapterpack.push(pack, registry.address(repository))
    attached = registry.referrers(repository, str(pushed.commit))
    signed = registry.manifest(attached["application/vnd.dev.sigstore.bundle.v0.3+json"])
    layers = [*registry.manifest(str(pushed.commit))["layers"], *signed["layers"]]
    [digest] = [one["digest"] for one in layers if one["annotations"]["org.cncf.model.filepath"] == name]
    data = bytearray(registry.blob(digest).read_bytes())
    data[-2] ^= 1
    registry.blob(digest).write_bytes(data)
    with pytest.raises(AdapterpackError, match="altered"):
        adapterpack.pull(registry.address(repository), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _outside(manifest: dict[str, Any]) -> None:
    manifest["layers"][0]["annotations"]["org.cncf.model.filepath"] = "../adapter_config.json"


def _nameless(manifest: dict[str, Any]) -> None:
    del manifest["layers"][0]["annotations"]


def _twice(manifest: dict[str, Any]) -> None:
    manifest["layers"].append(manifest["layers"][0])


def _many(manifest: dict[str, Any]) -> None:
    manifest["layers"] *= MAX_LAYERS


def _huge_manifest(manifest: dict[str, Any]) -> None:
    [mark] = [one for one in manifest["layers"] if "adapterpack.json" in one["annotations"].values()]
    mark["size"] = 1 << 50


def _negative(manifest: dict[str, Any]) -> None:
    manifest["layers"][0]["size"] = -1


def _other_type(manifest: dict[str, Any]) -> None:
    manifest["artifactType"] = "application/vnd.example"


HOSTILE: dict[str, tuple[Altered, str]] = {
    "outside": (_outside, "a path that must not become a file here"),
    "nameless": (_nameless, "a path that must not become a file here"),
    "twice": (_twice, "two paths that are one file"),
    "many": (_many, "the registry's manifest cannot be used"),
    "huge": (_huge_manifest, "the manifest is too large"),
    "negative": (_negative, "the registry's manifest cannot be used"),
    "other": (_other_type, "no model in the registry"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_is_refused_before_anything_is_fetched(
    what: str, registry: Registry, tmp_path: Path
) -> None:
    alter, message = HOSTILE[what]
    pushed = adapterpack.push(written(tmp_path), registry.address("hostile"))
    manifest = registry.manifest(str(pushed.commit))
    alter(manifest)
    registry.put("hostile", what, manifest)
    registry.fetched()
    with pytest.raises(FormatError, match=message):
        adapterpack.pull(f"{registry.address('hostile')}:{what}", tmp_path / "out")
    assert registry.fetched() == [] and left(tmp_path / "cache") == []


def _claims_more(manifest: dict[str, Any]) -> None:
    [file] = [one for one in manifest["layers"] if "adapter_model.safetensors" in one["annotations"].values()]
    file["size"] = 1 << 50


def _has_more(manifest: dict[str, Any]) -> None:
    manifest["layers"].append({**manifest["layers"][0], "annotations": {"org.cncf.model.filepath": "x.json"}})


@pytest.mark.parametrize("alter", [_claims_more, _has_more])
def test_only_what_the_packs_own_manifest_lists_is_fetched(
    alter: Altered, registry: Registry, tmp_path: Path
) -> None:
    """One request reads that manifest; then the lists differ."""
    pushed = adapterpack.push(written(tmp_path), registry.address("unlisted"))
    manifest = registry.manifest(str(pushed.commit))
    alter(manifest)
    registry.put("unlisted", "v1", manifest)
    registry.fetched()
    with pytest.raises(FormatError, match="not what its manifest lists"):
        adapterpack.pull(registry.address("unlisted") + ":v1", tmp_path / "out")
    [request] = registry.fetched()
    assert pushed.id in request


class Endless(BaseHTTPRequestHandler):
    """A registry whose manifests have no end."""

    sent = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while Endless.sent < 1 << 28:
                Endless.sent += self.wfile.write(b" " * (1 << 16))

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def test_a_manifest_without_an_end_is_refused(registry: Registry) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(HubError, match=r"answer is too large.*at most 4194304 bytes"):
            adapterpack.pull(f"oci://127.0.0.1:{server.server_port}/team/tickets")
        server.shutdown()
    assert Endless.sent < 1 << 26


def test_another_manifest_than_the_digest_names_is_refused(registry: Registry, tmp_path: Path) -> None:
    pushed = adapterpack.push(written(tmp_path, seed=4), registry.address("exchanged"))
    with registry.blob(str(pushed.commit)).open("ab") as file:
        file.write(b" ")
    with pytest.raises(FormatError, match="another manifest than was asked for"):
        adapterpack.pull(f"{registry.address('exchanged')}@{pushed.commit}")


def test_logins_are_those_of_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one the registry refuses, and the error says what to do."""
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    auth = {"htpasswd": {"realm": "ours", "path": str(tmp_path / "htpasswd")}}
    with running(tmp_path, auth) as registry:
        pack, address = written(tmp_path), registry.address("private")
        with pytest.raises(HubError, match=rf"does not permit this.*docker login {registry.host}"):
            adapterpack.push(pack, address)
        log_in(tmp_path / "home", registry.host)
        assert adapterpack.push(pack, address).id == adapterpack.pull(address).id


def test_what_is_not_there_and_what_cannot_be_meant(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RepoNotFound, match="no such repository, tag or digest"):
        adapterpack.pull(registry.address("nothing"))
    for address in (
        "oci://host",
        "oci://host/../name",
        "oci://host/Name",
        "oci://u:p@host/name",
        "oci://h/n@v1",
    ):
        with pytest.raises(ConfigError, match="not the address of a repository in a registry"):
            parse_address(address)
    with pytest.raises(ConfigError, match="a push goes to a tag"):
        adapterpack.push(written(tmp_path), f"oci://host/name@sha256:{'0' * 64}")
    with pytest.raises(ConfigError, match="neither pull requests nor messages"):
        adapterpack.push(tmp_path / "tickets", "oci://host/name", tag="v1")


def test_what_is_revoked_is_neither_pulled_nor_valid(
    registry: Registry, tmp_path: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pack, by a tensor, or by the key that signed; the error has the entry and its reason."""
    pack, address = written(tmp_path, seed=9), registry.address("revoked")
    key = adapterpack.sign(pack, keys[0]).key
    adapterpack.push(pack, address)
    assert adapterpack.pull(address).kind == "pack"
    loaded = adapterpack.load(pack)
    tensor, entry = next(iter(loaded.manifest.tensors.items()))
    monkeypatch.setenv("ADAPTERPACK_REVOKED", str(tmp_path / "revoked.json"))
    for digest, what in (
        (loaded.id, "the pack"),
        (f"sha256:{entry.sha256}", f"the tensor {tensor}"),
        (key, "the key of the signature"),
    ):
        revoke(tmp_path / "revoked.json", digest)
        with pytest.raises(Revoked, match=f"{what} is revoked: it leaks names.*{digest}"):
            adapterpack.pull(address)
        [finding] = adapterpack.validate(pack).findings
        assert f"{what} is revoked: it leaks names" in finding.message and digest in finding.message
    with pytest.raises(Revoked, match="the key of the signature is revoked"):
        adapterpack.verify(pack, keys[1])
    revoke(tmp_path / "revoked.json", loaded.id)
    for words, expected in ((("pull", address, "--no-lock"), 4), (("validate", pack), 1)):
        code, said = command(*words)
        assert code == expected and "it leaks names" in said
    revoke(tmp_path / "revoked.json", f"sha256:{'0' * 64}")
    assert adapterpack.pull(address).id == loaded.id and adapterpack.validate(pack).valid


def revoke(file: Path, digest: str) -> None:
    """Makes the list of one entry."""
    value = {"format": "adapterpack.revoked", "version": 1, "entries": {digest: "it leaks names"}}
    schema = json.loads((Path(__file__).parents[2] / "schemas" / "revoked.v1.json").read_bytes())
    Draft202012Validator(schema).validate(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "text", [None, "[]", "{}", '{"format": "adapterpack.revoked", "version": 1, "entries": {"x": ""}}']
)
def test_a_list_of_revocations_that_cannot_be_read_stops_everything(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = written(tmp_path)
    monkeypatch.setenv("ADAPTERPACK_REVOKED", str(tmp_path / "revoked.json"))
    if text is not None:
        (tmp_path / "revoked.json").write_text(text)
    with pytest.raises(AdapterpackError, match=r"revoked\.json|no list of revocations"):
        adapterpack.load(pack)
