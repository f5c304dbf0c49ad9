"""A hub, and another host that it points to, both real and both up to no good: the token stays, and nothing
hangs or fills the memory.
"""

from __future__ import annotations

import gzip
import json
import ssl
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hubs import WRITE, make_pack

import adapterpack
from adapterpack.errors import AdapterpackError, HubError, StorageError
from adapterpack.hub.resolve import folder_of
from adapterpack.hub.transport import client, http, names, transfer
from adapterpack.hub.transport.official import guarded_downloads

pytestmark = pytest.mark.fast

COMMIT = "0123456789" * 4
MIB = 1 << 20


class Host(ThreadingHTTPServer):
    """A server whose answers a test decides; it notes what it was asked, and with what authorization, and
    what it sent.
    """

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.address = f"http{'s' if context else ''}://127.0.0.1:{self.server_address[1]}"
        self.answers: Callable[[Asked], None] = lambda asked: asked.say(404)
        self.seen: list[tuple[str, str | None]] = []
        self.sent = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what is wanted."""


class Asked(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Host

    def answer(self) -> None:
        """Notes it and answers."""
        self.server.seen.append((f"{self.command} {self.path}", self.headers.get("Authorization")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.answers(self)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - the standard library's names

    def say(self, status: int = 200, value: Any = None, data: bytes | None = None, **headers: str) -> None:
        """A whole answer."""
        body = json.dumps(value).encode() if data is None else data
        self.begin(status, **{"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.send(body)

    def begin(self, status: int = 200, **headers: str) -> None:
        """The head of an answer."""
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()

    def send(self, data: bytes) -> None:
        """Some of its body."""
        self.wfile.write(data)
        self.server.sent += len(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for this machine, which clients are told to believe."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "other host")]),
    )
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("certificate") / "host.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


def running(context: ssl.SSLContext | None = None) -> Iterator[Host]:
    with Host(context) as host:
        threading.Thread(target=partial(host.serve_forever, poll_interval=0.05), daemon=True).start()
        yield host
        host.shutdown()


@pytest.fixture
def hub(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The hub that this process asks, with the user's token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    for host in running():
        monkeypatch.setenv("HF_ENDPOINT", host.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "models"))
        monkeypatch.setenv("HF_TOKEN", WRITE)
        monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 30.0)
        monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)
        close_session()
        yield host
    close_session()


@pytest.fixture
def other(certificate: Path) -> Iterator[Host]:
    """Another host, with TLS, so that nothing but its being another one keeps the token away."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    yield from running(context)


@pytest.fixture
def plain() -> Iterator[Host]:
    """Another host without TLS."""
    yield from running()


def is_info(asked: Asked) -> bool:
    return asked.path.startswith("/api/models/org/name/revision/")


def is_tree(asked: Asked) -> bool:
    return asked.path.startswith("/api/models/org/name/tree/")


def serves(host: Host, **more: Callable[[Asked], None]) -> None:
    """The repository org/name, with no files unless ``tree`` says otherwise; ``more`` answers what has that
    word in its path.
    """

    def answers(asked: Asked) -> None:
        found = next((act for word, act in more.items() if word in asked.path), None)
        if found is not None:
            found(asked)
        elif is_info(asked):
            asked.say(value={"sha": COMMIT, "id": "org/name"})
        elif is_tree(asked):
            asked.say(value=[])
        else:
            asked.say(404, {}, X_Error_Code="EntryNotFound")

    host.answers = answers


def listed() -> dict[str, client.ListedFile]:
    return client.tree(client.connect(names.parse("org/name")))


def remote() -> client.Remote:
    return client.Remote(names.parse("org/name").at(COMMIT), COMMIT, client.endpoint())


# --- the token ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "other"])
def test_a_listing_does_not_go_on_at_another_host(
    kind: str, hub: Host, request: pytest.FixtureRequest
) -> None:
    """``Link: rel=next`` is followed on the hub alone."""
    elsewhere: Host = request.getfixturevalue(kind)
    page = [{"type": "file", "path": "a.json", "size": 2, "oid": "0" * 40}]
    serves(hub, tree=lambda asked: asked.say(value=page, Link=f'<{elsewhere.address}/next>; rel="next"'))
    with pytest.raises(HubError, match="another host"):
        listed()
    assert elsewhere.seen == []
    assert hub.seen[-1][1] == f"Bearer {WRITE}"


def test_a_listing_may_name_its_next_page_without_a_host(hub: Host) -> None:
    pages = iter([["a.json"], ["b.json"]])

    def tree(asked: Asked) -> None:
        link = {"Link": '</api/models/org/name/tree/more>; rel="next"'} if "more" not in asked.path else {}
        asked.say(
            value=[{"type": "file", "path": path, "size": 2, "oid": "0" * 40} for path in next(pages)], **link
        )

    serves(hub, tree=tree)
    assert sorted(listed()) == ["a.json", "b.json"]


def test_bytes_from_another_host_come_without_the_token(hub: Host, other: Host) -> None:
    """A download link: the hub hears the token, the host that keeps its files does not."""
    serves(hub, resolve=lambda asked: asked.say(302, Location=f"{other.address}/bytes", X_Repo_Commit=COMMIT))
    other.answers = lambda asked: asked.say(data=b"bytes")
    assert transfer.read_range(remote(), "a.bin", 0, 5) == b"bytes"
    assert hub.seen == [(f"GET /org/name/resolve/{COMMIT}/a.bin", f"Bearer {WRITE}")]
    assert other.seen == [("GET /bytes", None)]


def test_large_files_go_to_another_host_without_the_token(hub: Host, other: Host, tmp_path: Path) -> None:
    """Addresses for uploads in one piece, in parts, and for what the hub wants to be told afterwards: each on
    another host.
    """
    sent: dict[str, Any] = {}

    def batch(asked: Asked) -> None:
        [one] = json.loads(asked.body)["objects"]
        sent[one["oid"]] = one["size"]
        asked.say(value={"objects": [{**one, "actions": actions(one["size"])}]})

    def actions(size: int) -> dict[str, Any]:
        upload: dict[str, Any] = {"href": f"{other.address}/done"}
        if in_parts:
            half = -(-size // 2)
            upload["header"] = {"chunk_size": str(half), "1": f"{other.address}/1", "2": f"{other.address}/2"}
        return {"upload": upload, "verify": {"href": f"{other.address}/verify"}}

    def preupload(asked: Asked) -> None:
        paths = [one["path"] for one in json.loads(asked.body)["files"]]
        asked.say(
            value={
                "files": [
                    {"path": path, "uploadMode": "lfs" if "safetensors" in path else "regular"}
                    for path in paths
                ]
            }
        )

    def commit(asked: Asked) -> None:
        sent["commit"] = [json.loads(line) for line in asked.body.splitlines()]
        asked.say(value={"commitOid": "9" * 40})

    serves(hub, batch=batch, preupload=preupload, commit=commit)
    other.answers = lambda asked: asked.say(value={}, ETag='"x"')
    for in_parts in (False, True):
        other.seen.clear()
        # this one lists nothing
        with pytest.raises(AdapterpackError, match="what arrived at the hub is not what was sent"):
            adapterpack.push(make_pack(), "hf://org/name", license="mit")
        wanted = (
            ["PUT /1", "PUT /2", "POST /done", "POST /verify"] if in_parts else ["PUT /done", "POST /verify"]
        )
        assert other.seen == [(one, None) for one in wanted]
    assert all(token == f"Bearer {WRITE}" for _, token in hub.seen)
    assert {"lfsFile", "file", "header"} == {line["key"] for line in sent["commit"]}


@pytest.mark.parametrize("kind", ["redirect", "xet"])
def test_a_base_from_another_host_comes_without_the_token(
    kind: str, hub: Host, other: Host, tmp_path: Path
) -> None:
    """The official client fetches bases: redirects, and the address of the service that it asks for parts of
    files, lead elsewhere.
    """
    config = json.dumps({"model_type": "llama"}).encode()
    siblings = [{"rfilename": "config.json"}]

    def resolve(asked: Asked) -> None:
        named = {
            "X_Repo_Commit": COMMIT,
            "ETag": '"abc"',
            "X_Linked_Etag": f'"{"0" * 64}"',
            "X_Linked_Size": str(len(config)),
        }
        if kind == "redirect":
            asked.say(302, Location=f"{other.address}/bytes", **named)
        else:
            asked.say(
                302,
                Location=f"{other.address}/bytes",
                X_Xet_Hash="0" * 64,
                X_Xet_Refresh_Route=f"{other.address}/xet",
                **named,
            )

    serves(
        hub,
        resolve=resolve,
        revision=lambda asked: asked.say(value={"sha": COMMIT, "id": "org/name", "siblings": siblings}),
        tree=lambda asked: asked.say(
            value=[{"type": "file", "path": "config.json", "size": len(config), "oid": "0" * 40}]
        ),
    )
    # which older clients look for wherever a redirect ends
    of_the_hub = {"X_Repo_Commit": COMMIT, "ETag": '"abc"'}
    other.answers = lambda asked: (
        asked.say(404) if "xet" in asked.path else asked.say(data=config, **of_the_hub)
    )
    try:
        folder_of("org/name")
    except StorageError:
        assert kind == "xet"  # a service that is none
    assert other.seen
    assert [token for _, token in other.seen if token is not None] == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://hub.example/a", "https://hub.example:443/b?c", True),
        ("http://hub.example", "http://HUB.example:80/", True),
        ("https://hub.example", "https://me:secret@hub.example/", True),
        ("https://hub.example", "http://hub.example", False),
        ("https://hub.example", "https://hub.example:8443", False),
        ("https://hub.example", "https://hub.example.evil", False),
        ("https://hub.example", "https://hub.example@evil", False),
        ("https://hub.example", "https://evil/hub.example", False),
    ],
)
def test_an_origin_is_scheme_host_and_port(one: str, other: str, same: bool) -> None:
    assert http.same_origin(one, other) is same


def test_a_new_session_of_the_official_client_keeps_the_token_at_home_too(hub: Host, other: Host) -> None:
    """The client makes one after a connection that failed, which a hub can bring about."""
    from huggingface_hub.utils import close_session, get_session

    token = {"Authorization": f"Bearer {WRITE}"}
    for before in (get_session, close_session):
        with guarded_downloads(hub.address):
            before()
            for host in (hub, other):
                get_session().get(f"{host.address}/x", headers=token)
    assert [value for _, value in hub.seen] == [f"Bearer {WRITE}"] * 2
    assert [value for _, value in other.seen] == [None] * 2
    get_session().get(f"{other.address}/x", headers=token)
    assert other.seen[-1][1] == f"Bearer {WRITE}", "what others do with the client is theirs"


# --- time and memory ----------------------------------------------------------------------------------------


def trickles(asked: Asked) -> None:
    """A byte now and then: no pause is long, and there is no end."""
    asked.begin(Content_Length="100000", Content_Type="application/json")
    for _ in range(4000):
        asked.send(b" ")
        time.sleep(0.05)


def trickles_its_head(asked: Asked) -> None:
    """The same with headers, of which a client waits for the last."""
    asked.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(4000):
        asked.wfile.write(b"X-%d: x\r\n" % number)
        asked.wfile.flush()
        time.sleep(0.05)


def trickles_its_error(asked: Asked) -> None:
    asked.begin(400, Content_Length="100000")
    for _ in range(4000):
        asked.send(b" ")
        time.sleep(0.05)


def never_ends(asked: Asked, status: int = 200) -> None:
    """Four gigabytes, if somebody takes them."""
    asked.begin(status, Content_Length=str(4 << 30), Content_Type="application/json")
    for _ in range(4 << 10):
        asked.send(b" " * MIB)


def unpacks(asked: Asked, status: int = 200) -> None:
    """Six megabytes that unpack to six gigabytes."""
    asked.begin(
        status, Content_Encoding="gzip", Content_Type="application/json", Content_Length=str(len(BOMB) * 24)
    )
    for _ in range(24):
        asked.send(BOMB)


def bomb(size: int) -> bytes:
    """So many MiB of zeros in gzip's format, of one compressed block for each: to compress them all takes
    seconds.
    """
    packer, checksum = zlib.compressobj(9, wbits=-15), 0
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(size):
        checksum = zlib.crc32(bytes(MIB), checksum)
    return gzip.compress(b"")[:10] + block * size + packer.flush() + struct.pack("<II", checksum, size * MIB)


BOMB = bomb(256)


def no_text(asked: Asked) -> None:
    asked.say(data=b"[" * 500_000)


def empty_pages(asked: Asked) -> None:
    asked.say(value=[], Link=f'<{asked.path}&more=1>; rel="next"')


def pages_of_folders(asked: Asked) -> None:
    asked.say(
        value=[{"type": "directory", "path": "a", "oid": "0" * 40, "size": 0}] * 1000,
        Link=f'<{asked.path}>; rel="next"',
    )


HOSTILE: dict[str, tuple[Callable[[Asked], None], str]] = {
    "trickles": (trickles, "too slowly"),
    "trickles its head": (trickles_its_head, "too slowly"),
    "trickles its error": (trickles_its_error, "too slowly"),
    "never ends": (never_ends, "too large"),
    "unpacks": (unpacks, "compresses"),
    "an error that never ends": (partial(never_ends, status=400), "does not answer as it should"),
    "an error that unpacks": (partial(unpacks, status=400), "does not answer as it should"),
    "no text": (no_text, "does not answer as it should"),
}


def bounded(hub: Host, act: Callable[[], object], says: str) -> None:
    """The act ends with a named error in seconds, having taken some dozens of megabytes from the hub,
    and of memory.
    """
    hub.sent, started = 0, time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(AdapterpackError, match=says) as caught, pytest.MonkeyPatch.context() as patch:
            if says == "too slowly":  # a busy machine may be slow elsewhere, too
                patch.setattr(http, "_GRACE", 0.8)
            act()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 100
    assert hub.sent < 96 * MIB
    assert peak < 192 * MIB, "of this process, in which the host is, too"
    assert WRITE not in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("where", ["revision", "tree"])
def test_what_is_asked_first_is_bounded(where: str, name: str, hub: Host) -> None:
    act, says = HOSTILE[name]
    serves(hub, **{where: act})
    bounded(hub, listed, says)


@pytest.mark.parametrize("name", ["trickles", "never ends", "unpacks", "an error that unpacks"])
def test_what_the_official_client_is_answered_is_bounded(name: str, hub: Host) -> None:
    """It reads the listing of a base."""
    act, says = {**HOSTILE, "an error that unpacks": (HOSTILE["an error that unpacks"][0], "compresses")}[
        name
    ]
    serves(hub, revision=act)
    with guarded_downloads(hub.address):
        bounded(hub, lambda: client.api().model_info("org/name", revision="main"), says)


def test_the_official_client_is_not_made_to_wait_for_years(hub: Host) -> None:
    from huggingface_hub.utils import get_session

    hub.answers = lambda asked: asked.say(
        429, {}, Retry_After="1000000000", RateLimit='"api";r=0;t=1000000000'
    )
    with guarded_downloads(hub.address):
        response = get_session().get(f"{hub.address}/x")
    assert (response.headers["Retry-After"], response.headers["RateLimit"]) == ("999", '"api";r=0;t=999')


ANSWERS = [
    *((where, name) for where in ("preupload", "batch") for name in HOSTILE),
    # which may take ten minutes to be made
    *(("commit", name) for name in HOSTILE if name != "trickles its head"),
    ("create", "trickles its head"),
    ("create", "an error that never ends"),
    ("create", "an error that unpacks"),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("where", "name"), ANSWERS)
def test_what_a_push_is_answered_is_bounded(where: str, name: str, hub: Host) -> None:
    act, says = HOSTILE[name]
    known = {
        "batch": lambda asked: asked.say(value={"objects": []}),
        "preupload": lambda asked: asked.say(
            value={"files": [{"path": "adapter_model.safetensors", "uploadMode": "lfs"}]}
        ),
    }
    missing = (
        {"revision": lambda asked: asked.say(404, {}, X_Error_Code="RepoNotFound")}
        if where == "create"
        else {}
    )
    serves(hub, **{**known, **missing, where: act})
    bounded(hub, lambda: adapterpack.push(make_pack(), "hf://org/name", license="mit"), says)


def test_a_large_file_is_not_read_into_memory_because_the_hub_wants_it_so(hub: Host) -> None:
    """Within a commit go small files only."""
    serves(hub, preupload=lambda asked: asked.say(value={"files": []}))
    bounded(
        hub,
        lambda: adapterpack.push(make_pack(width=1_000_000), "hf://org/name", license="mit"),
        "large file within the commit",
    )
    assert not any("/commit/" in what for what, _ in hub.seen)


def test_a_listing_of_empty_pages_has_an_end(hub: Host) -> None:
    serves(hub, tree=empty_pages)
    bounded(hub, listed, "no end")
    assert len(hub.seen) == 2


def test_a_listing_of_folders_has_an_end(hub: Host) -> None:
    serves(hub, tree=pages_of_folders)
    bounded(hub, listed, "too many files")
    assert len(hub.seen) < 30


@pytest.mark.parametrize("name", ["trickles", "trickles its head", "unpacks", "an error that never ends"])
def test_the_bytes_of_a_file_are_bounded(name: str, hub: Host, tmp_path: Path) -> None:
    act, says = HOSTILE[name]

    def resolve(asked: Asked) -> None:
        begin = asked.begin
        asked.begin = lambda status=200, **headers: begin(status, X_Repo_Commit=COMMIT, **headers)  # type: ignore[method-assign]
        act(asked)

    serves(hub, resolve=resolve)
    file = client.ListedFile("a.bin", 4 << 30, "0" * 64, None)
    bounded(hub, lambda: transfer.fetch(remote(), file, tmp_path / "a.bin"), says)
    assert not (tmp_path / "a.bin").exists()
