"""Reads and writes OCI registries within the limits of :mod:`.http`. A file of an artifact is one raw layer,
so a registry names it by the digest that the artifact's own manifest has for it.

Source: OCI distribution 1.1 (the referrers of a manifest with its fallback to tags) and CNCF ModelPack 0.0.7.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Annotated, Any
from urllib.parse import urlencode, urljoin, urlsplit

import msgspec
from msgspec import Meta, Struct

from ...errors import ConfigError, FormatError, HubError, RepoNotFound
from ...extras import needed_by
from ...http import is_loopback
from ...io import Whole
from ...manifest import Sha256
from ...pack import SIGNATURE
from ...pack.trust.dsse import MEDIA_TYPE as SIGNATURE_TYPE
from . import names
from .client import ListedFile, Remote, connect, hub_errors, tree, with_retries
from .http import ByteLimit, Endpoint, ErrorResponse, open_response, read_body, request_json
from .local_files import LocalFile

SCHEME = "oci://"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
PATH = "org.cncf.model.filepath"
MAX_MANIFEST = 4 << 20
"""The most bytes of a manifest, which every registry takes by the specification."""
MAX_LAYERS = 4096
MAX_READ = 16
"""The most manifests that are read in search of a signature."""
_HOST = r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}(?::[0-9]{1,5})?"
_NAME = r"[a-z0-9][a-z0-9._-]{0,127}(?:/[a-z0-9][a-z0-9._-]{0,127}){0,7}"
_ADDRESS = re.compile(
    rf"({_HOST}/{_NAME})(?::([A-Za-z0-9_][A-Za-z0-9._-]{{0,127}})|@(sha256:[0-9a-f]{{64}}))?"
)


_Token = Annotated[str, Meta(pattern=r"^[!-~]+\Z")]


class _Granted(Struct):
    """What a service of tokens answers under either name; "none" is no token, and is refused."""

    token: _Token = ""
    access_token: _Token = "none"


class Descriptor(Struct, omit_defaults=True, rename="camel"):
    """What a manifest says of a blob, or an index of a manifest."""

    media_type: str
    digest: Sha256
    size: Whole
    artifact_type: str = ""
    annotations: dict[str, str] = {}


_Entries = Annotated[list[Descriptor], Meta(max_length=MAX_LAYERS)]


class ImageManifest(Struct, rename="camel"):
    """The manifest of an artifact with its layers, or an index of manifests."""

    artifact_type: str = ""
    layers: _Entries = []
    manifests: _Entries = []


class RegistryReference(names.HubReference):
    """A repository in a registry, HOST/NAME, and a tag or a digest as its revision."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}{'@' if ':' in self.revision else ':'}{self.revision}"


def parse_address(text: str) -> names.HubReference:
    """Parses the address of a repository in a registry (``oci://``) or on a hub.

    Raises:
        ConfigError: the text has neither form.

    Example:
        >>> str(parse_address("oci://ghcr.io/org/tickets"))
        'oci://ghcr.io/org/tickets:latest'
    """
    if not text.startswith(SCHEME):
        return names.parse(text)
    match = _ADDRESS.fullmatch(text.removeprefix(SCHEME))
    if match is None:
        raise ConfigError(
            "this is not the address of a repository in a registry",
            where=text,
            expected="oci://HOST[:PORT]/NAME, with or without :TAG or @sha256:DIGEST",
        )
    return RegistryReference(match[1], match[2] or match[3] or "latest")


class RegistryClient:
    """A repository in a registry, and what it permits so far. Only this machine is asked without TLS.

    Raises:
        MissingExtra: the client library for registries is not installed.
    """

    def __init__(self, reference: names.HubReference) -> None:
        with needed_by("registries"):
            self._auth, self._container = (import_module(f"oras.{name}") for name in ("auth", "container"))
        self.reference, (self.host, _, name) = reference, reference.repo.partition("/")
        scheme = "http" if is_loopback(self.host.partition(":")[0]) else "https"
        self.home = f"{scheme}://{self.host}"
        self.url = f"{scheme}://{self.host}/v2/{name}/"
        self._granted = dict[str, str]()

    @contextmanager
    def open(self, method: str, path: str, file: LocalFile | None = None, **options: Any) -> Iterator[Any]:
        """Sends a request below the repository's address, logs in if asked to, and yields the response.

        Raises:
            RepoNotFound: the registry has nothing there.
            HubError: it refuses.
        """

        def send() -> Any:
            home = Endpoint(self.home, False, self._granted)
            url = urljoin(self.url, path)
            content = None if file is None else file.part(0, file.size)
            asked = open_response(method, url, home, self.reference, content=content, **options)
            return stack.enter_context(asked)

        with ExitStack() as stack:
            try:
                try:
                    response = send()
                except ErrorResponse as error:
                    if error.response.status_code != 401:
                        raise
                    self._authorize(error.response.headers.get("WWW-Authenticate", ""))
                    response = send()
            except ErrorResponse as error:
                raise self._explain(error) from None
            yield response

    def _authorize(self, challenge: str) -> None:
        """Logs in as a registry asks: with the user's password, or with a token that it is exchanged for."""
        auth = self._auth.get_auth_backend()
        auth.load_configs(self._container.Container(self.reference.repo))
        password = getattr(auth, "_basic_auth", None)
        self._granted = {"authorization": f"Basic {password}"} if password else {}
        asked = self._auth.utils.parse_auth_header(challenge)
        if not challenge.casefold().startswith("bearer") or not asked.realm:
            return
        here = self.home.startswith("http:") and is_loopback(urlsplit(asked.realm).hostname or "")
        if not asked.realm.startswith("https://") and not here:
            raise HubError(
                "the registry sends its clients for a token to an address that is not https",
                where=self.reference,
                found=asked.realm[:80],
                remedy="do not use this registry",
            )
        query = urlencode({key: value for key in ("service", "scope") if (value := getattr(asked, key))})
        service = Endpoint(asked.realm, False, self._granted)
        url = f"{asked.realm}{'&' if '?' in asked.realm else '?'}{query}"
        _, answer = request_json("GET", url, service, self.reference, _Granted)
        self._granted = {"authorization": f"Bearer {answer.token or answer.access_token}"}

    def _explain(self, error: ErrorResponse) -> Exception:
        status = error.response.status_code
        if status in {401, 403}:
            return HubError(
                "the registry does not permit this",
                where=self.reference,
                found=status,
                remedy=f"log in with the rights for it: docker login {self.host}",
            )
        if status == 404:
            return RepoNotFound("the registry has no such repository, tag or digest", where=self.reference)
        return error

    def manifest(self, revision: str) -> tuple[str, ImageManifest]:
        """Reads the manifest of a tag or a digest, and returns its digest and what it says.

        Raises:
            FormatError: it is none, or another one than the digest names.
        """
        digest, manifest = self._read(f"manifests/{revision}", MANIFEST)
        if ":" in revision and digest != revision:
            raise FormatError(
                "the registry sends another manifest than was asked for", where=self.reference, found=digest
            )
        return digest, manifest

    def _read(self, path: str, accept: str) -> tuple[str, ImageManifest]:
        def once() -> bytes:
            with self.open("GET", path, headers={"Accept": accept}) as response:
                return read_body(response, self.reference, ByteLimit(self.reference, MAX_MANIFEST))

        with hub_errors(self.reference):
            data = with_retries(once)
        try:
            read = msgspec.json.decode(data, type=ImageManifest)
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"the registry's manifest cannot be used: {str(error)[:200]}", where=self.reference
            ) from error
        return f"sha256:{hashlib.sha256(data).hexdigest()}", read

    def referrers(self, digest: str) -> list[Descriptor]:
        """Lists what was attached to a manifest: as the registry knows it, or by the tag for registries that
        do not.
        """
        for path in (f"referrers/{digest}", f"manifests/{digest.replace(':', '-')}"):
            try:
                return self._read(path, INDEX)[1].manifests
            except RepoNotFound:
                continue
        return []


@dataclass(frozen=True, kw_only=True)
class RegistryRemote(Remote):
    """An artifact in a registry; its commit is the digest of its OCI manifest."""

    registry: RegistryClient
    manifest: ImageManifest

    @cached_property
    def files(self) -> dict[str, ListedFile]:
        """Its layers by their paths, and the signature that was attached to it last.

        Raises:
            FormatError: a layer has no path, or an unsafe one.
        """
        listed = [_listed(layer.annotations.get(PATH, ""), layer) for layer in self.manifest.layers]
        # some registries list the type of the configuration, which is empty, in place of the artifact's
        types = (SIGNATURE_TYPE, EMPTY)
        signed = [one for one in self.registry.referrers(self.commit) if one.artifact_type in types]
        for one in signed[: -MAX_READ - 1 : -1]:
            _, signature = self.registry.manifest(one.digest)
            if signature.artifact_type == SIGNATURE_TYPE:
                listed += [_listed(SIGNATURE, layer) for layer in signature.layers[:1]]
                break
        names.require_safe([file.path for file in listed], self)
        return {file.path: file for file in listed}

    @contextmanager
    def open(self, path: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """Opens the response with the bytes of a file; whoever reads them compares them with its digest."""
        blob = f"blobs/sha256:{self.files[path].sha256}"
        with self.registry.open("GET", blob, headers=headers) as response:
            yield response


def _listed(path: str, layer: Descriptor) -> ListedFile:
    return ListedFile(path, layer.size, layer.digest.removeprefix("sha256:"), None)


@connect.register
def _(reference: RegistryReference, token: str | None = None) -> Remote:
    registry = RegistryClient(reference)
    digest, manifest = registry.manifest(reference.revision)
    if manifest.artifact_type != ARTIFACT:
        raise FormatError(
            "this is no model in the registry",
            where=reference,
            expected=ARTIFACT,
            found=manifest.artifact_type[:80],
        )
    return RegistryRemote(reference, digest, registry.home, registry=registry, manifest=manifest)


@tree.register
def _(remote: RegistryRemote) -> dict[str, ListedFile]:
    return dict(remote.files)
