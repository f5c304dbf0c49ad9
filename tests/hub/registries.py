"""A real registry of containers in a process of its own (Debian's docker-registry), on the loopback alone, with what
tests read and alter in its storage.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from processes import child, reserved_port

USER, PASSWORD = "ann", "pass word"
HTPASSWD = "ann:$2b$05$abcdefghijklmnopqrstuuIt/9/tGzLcigNq/.RWIDjeEVR30RSf."  # of that password, as registries keep it
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def program(name: str) -> str:
    """The path of a program of Debian, without which the test is skipped, and says so."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install docker-registry skopeo")
    return path


@dataclass(frozen=True)
class Registry:
    """Its host and port, where it keeps what it has, and its log of requests."""

    host: str
    folder: Path
    log: Path

    def address(self, name: str) -> str:
        """The address of a repository."""
        return f"oci://{self.host}/team/{name}"

    def blob(self, digest: str) -> Path:
        """The file of a blob or a manifest in its storage."""
        digits = digest.removeprefix("sha256:")
        return self.folder / f"docker/registry/v2/blobs/sha256/{digits[:2]}/{digits}/data"

    def manifest(self, digest: str) -> dict[str, Any]:
        """A manifest, read from its storage."""
        value: dict[str, Any] = json.loads(self.blob(digest).read_bytes())
        return value

    def referrers(self, name: str, digest: str) -> dict[str, str]:
        """What is attached to a manifest, as another client reads it: type of artifact -> digest."""
        tag = f"docker://{self.host}/team/{name}:{digest.replace(':', '-')}"
        command = [program("skopeo"), "inspect", "--raw", "--tls-verify=false", tag]
        index = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return {one["artifactType"]: one["digest"] for one in index["manifests"]}

    def put(self, name: str, tag: str, manifest: Mapping[str, Any]) -> str:
        """Writes a manifest, or a list of some, under a tag, and returns its digest."""
        data = json.dumps(manifest).encode()
        url = f"http://{self.host}/v2/team/{name}/manifests/{tag}"
        request = urllib.request.Request(
            url, data, {"Content-Type": manifest.get("mediaType", MANIFEST)}, method="PUT"
        )
        with urllib.request.urlopen(request):
            return f"sha256:{sha256(data).hexdigest()}"

    def fetched(self) -> list[str]:
        """The blobs that clients have fetched since the last call."""
        time.sleep(0.2)  # it writes its log after the answer
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return [line for line in lines if '"GET ' in line and "/blobs/" in line]


@contextmanager
def running(folder: Path, auth: Mapping[str, Any] | None = None) -> Iterator[Registry]:
    """A registry that keeps everything in a folder, with or without logins."""
    program("docker-registry")
    log = folder / "requests"
    with reserved_port() as port:
        config = {
            "version": "0.1",
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": {"addr": f"127.0.0.1:{port}"},
            **({} if auth is None else {"auth": auth}),
        }
        (folder / "config.yml").write_text(json.dumps(config))
    with (
        log.open("a") as out,
        child(["docker-registry", "serve", folder / "config.yml"], stdout=out, stderr=subprocess.DEVNULL),
    ):
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/")
            except urllib.error.HTTPError:  # it wants a login
                break
            except OSError:
                time.sleep(0.05)
            else:
                break
        yield Registry(f"127.0.0.1:{port}", folder / "data", log)


def log_in(home: Path, host: str, user: str = USER, password: str = PASSWORD) -> None:
    """Writes the configuration of docker with a password for a registry."""
    secret = base64.b64encode(f"{user}:{password}".encode()).decode()
    (home / ".docker").mkdir(parents=True, exist_ok=True)
    (home / ".docker" / "config.json").write_text(json.dumps({"auths": {host: {"auth": secret}}}))


def copied(registry: Registry, name: str, revision: str, folder: Path) -> dict[str, Any]:
    """Copies an artifact by another client, skopeo; its files get their names in the manifest, which is
    returned.
    """
    source = f"docker://{registry.host}/team/{name}@{revision}"
    command = [program("skopeo"), "copy", "-q", "--src-tls-verify=false", source, f"dir:{folder}/raw"]
    subprocess.run(command, check=True)
    manifest: dict[str, Any] = json.loads((folder / "raw" / "manifest.json").read_bytes())
    for layer in manifest["layers"]:
        data = folder / "raw" / layer["digest"].removeprefix("sha256:")
        shutil.copyfile(data, folder / layer["annotations"]["org.cncf.model.filepath"])
    shutil.rmtree(folder / "raw")
    return manifest
