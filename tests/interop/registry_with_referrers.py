"""Packs in a registry of another make, Google's go-containerregistry, which knows the API of referrers, behind docker's
own check of tokens: ``python registry_with_referrers.py``. Other clients are skopeo and oras.

It needs Debian's packages golang-go, golang-github-google-go-containerregistry-dev, golang-github-docker-distribution-dev,
skopeo and oras, of which the first three build the registry here; .ci/run does without. That registry
does not say ``OCI-Subject``, so that a pack's signature is listed twice, by the API and under a tag; it is tried a
second time with that header, which is ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "hub"), str(HERE.parent / "packs")]

from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from hubs import make_pack  # noqa: E402
from processes import child, reserved_port  # noqa: E402
from registries import PASSWORD, USER, log_in  # noqa: E402
from tokens import Tokens, exchanging  # noqa: E402

import adapterpack  # noqa: E402
from adapterpack.errors import HubError  # noqa: E402

RIGHTS = {f"{USER}:{PASSWORD}": frozenset({"pull", "push"}), "bob:reads": frozenset({"pull"})}
SIGNATURE, BILL = "application/vnd.dev.sigstore.bundle.v0.3+json", "application/vnd.cyclonedx+json"


def build(folder: Path) -> Path:
    """Compiles the registry from the sources that Debian ships."""
    environment = {**os.environ, "GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": ""}
    command = ["go", "build", "-o", str(folder / "registry"), str(HERE / "registry_with_referrers.go")]
    subprocess.run(command, check=True, env={**environment, "GOCACHE": str(folder / "cache")})
    return folder / "registry"


@contextmanager
def serving(program: Path, tokens: Tokens, subject: bool) -> Iterator[str]:
    """The registry, empty, in a process of its own; its host and port."""
    with reserved_port() as port:
        host = f"127.0.0.1:{port}"
    options = ["-address", host, "-realm", tokens.realm, "-certificate", tokens.certificate]
    log = program.with_name("log").open("w")
    with log, child([program, *options, *(["-subject"] if subject else [])], stderr=log):
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://{host}/v2/")
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.05)
        yield host


def oras(*words: str) -> Any:
    """What oras prints, which has the same login."""
    login = ["--plain-http", "-u", USER, "--password-stdin"]
    command = ["oras", *words, *login]
    done = subprocess.run(command, input=PASSWORD, check=True, capture_output=True, text=True)
    return done.stdout


def attached(host: str, digest: str) -> dict[str, str]:
    """What oras finds attached: type of artifact -> digest. The type is read from each manifest, since this
    registry lists another.
    """
    found = json.loads(oras("discover", "--format", "json", f"{host}/team/tickets@{digest}"))
    digests = [one["digest"] for one in found.get("manifests") or found.get("referrers")]
    kinds = [json.loads(oras("manifest", "fetch", f"{host}/team/tickets@{one}")) for one in digests]
    return {kind["artifactType"]: digest for kind, digest in zip(kinds, digests, strict=True)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def try_it(program: Path, folder: Path, subject: bool) -> None:
    """A pack goes there and back; what was attached is found by another client; rights are asked for."""
    os.environ["ADAPTERPACK_CACHE"], home = str(folder / "cache"), Path(os.environ["HOME"])
    pack = make_pack("tickets").write(folder / "tickets").path
    assert pack is not None
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "key.pub").write_bytes(key.public_key().public_bytes(pem, info))
    adapterpack.sign(pack, folder / "key.pem", identity="ann")
    with exchanging(RIGHTS, folder) as tokens, serving(program, tokens, subject) as host:
        address = f"oci://{host}/team/tickets"
        log_in(home, host)
        pushed = adapterpack.push(pack, address)
        wanted = {f"repository:team/tickets:{actions}" for actions in ("pull", "pull,push")}
        assert {scope for _, scope in tokens.asked} == wanted, tokens.asked
        tokens.asked.clear()
        pulled = adapterpack.pull(f"{address}@{pushed.commit}", folder / "ours")
        assert contents(pulled.path) == contents(pack)
        assert {scope for _, scope in tokens.asked} == {"repository:team/tickets:pull"}
        print("pushed and pulled by digest with tokens, the signature with it")

        tags = oras("repo", "tags", f"{host}/team/tickets").split()
        assert [*tags] == (["latest"] if subject else ["latest", str(pushed.commit).replace(":", "-")])
        found = attached(host, str(pushed.commit))
        assert set(found) == {SIGNATURE, BILL}
        for number, digest in enumerate((str(pushed.commit), found[SIGNATURE], found[BILL])):
            oras("pull", "-o", str(folder / "theirs" / str(number // 2)), f"{host}/team/tickets@{digest}")
        assert contents(folder / "theirs" / "0") == contents(pack)
        bill = json.loads((folder / "theirs" / "1" / "bom.cdx.json").read_bytes())
        assert bill == adapterpack.bom(pack)
        assert adapterpack.verify(folder / "theirs" / "0", folder / "key.pub").identity == "ann"
        source = f"docker://{host}/team/tickets@{found[SIGNATURE]}"
        login = ["--src-creds", f"{USER}:{PASSWORD}", "--src-tls-verify=false"]
        subprocess.run(["skopeo", "copy", "-q", *login, source, f"dir:{folder / 'raw'}"], check=True)
        signature = (pack / "adapterpack.sig.json").read_bytes()
        assert signature in [path.read_bytes() for path in (folder / "raw").iterdir()]
        print(f"found by the API of referrers by oras, taken by oras and skopeo; tags: {tags}")

        log_in(home, host, "bob", "reads")
        assert adapterpack.pull(address).id == pushed.id
        try:
            adapterpack.push(make_pack("other", seed=5).write(folder / "other"), address)
        except HubError as error:
            print(f"who may only read: {error}")
        else:
            raise AssertionError("bob may write")
        lines = program.with_name("log").read_text().splitlines()
        print(f"{sum('/referrers/' in line for line in lines)} of {len(lines)} requests for referrers")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "home").mkdir()
        os.environ.update(HOME=str(folder / "home"), HF_HUB_OFFLINE="0")
        program = build(folder)
        for subject in (False, True):
            print("with OCI-Subject" if subject else "as it is")
            (folder / str(subject)).mkdir()
            try_it(program, folder / str(subject), subject)


if __name__ == "__main__":
    main()
