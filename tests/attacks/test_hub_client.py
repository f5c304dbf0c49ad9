"""Attacks by a hub, and by hosts that it points to, on its clients: a real server, and the command line in a process of its own."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from attack import SECRET, Attacks, Outcome

COMMIT = "0123456789" * 4
MIB = 1 << 20
PACK = b'{"format": "adapterpack"}'


class Host(ThreadingHTTPServer):
    """A hub, or another host, whose answers a test decides; it notes the authorization of every request."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.port = self.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.answers: dict[str, Callable[[Request], None]] = {}
        self.seen: list[tuple[str, str | None]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what is wanted."""


class Request(BaseHTTPRequestHandler):
    """One request: answered by the first answer whose word is in its path, else as a sound hub with one repository would."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Host

    def answer(self) -> None:
        self.server.seen.append((f"{self.command} {self.path}", self.headers.get("Authorization")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for word, act in self.server.answers.items():
            if word in self.path:
                act(self)
                return
        if "/revision/" in self.path:
            self.say({"sha": COMMIT, "id": "org/name"})
        elif "/tree/" in self.path:
            self.say([entry("adapterpack.json", PACK)])
        elif "/resolve/" in self.path:
            self.say(data=PACK, X_Repo_Commit=COMMIT)
        else:
            self.say({}, 404, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - the standard library's names

    def say(self, value: Any = None, status: int = 200, data: bytes | None = None, **headers: str) -> None:
        """A whole answer."""
        body = json.dumps(value).encode() if data is None else data
        self.begin(status, **{"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: int = 200, **headers: str) -> None:
        """The head of an answer."""
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def entry(path: Any, data: bytes = b"{}", **more: Any) -> dict[str, Any]:
    git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": git, **more}


def running() -> Iterator[Host]:
    with Host() as host:
        threading.Thread(target=partial(host.serve_forever, poll_interval=0.02), daemon=True).start()
        yield host
        host.shutdown()


@pytest.fixture(scope="module")
def _hub() -> Iterator[Host]:
    yield from running()


@pytest.fixture(scope="module")
def _other() -> Iterator[Host]:
    yield from running()


@pytest.fixture
def hub(_hub: Host) -> Host:
    _hub.answers, _hub.seen = {}, []
    return _hub


@pytest.fixture
def other(_other: Host) -> Host:
    _other.answers, _other.seen = {"": lambda request: request.say([])}, []
    return _other


def impatient(address: str, *arguments: str) -> int:
    """The command line as a client of this hub, with waits of a tenth of those that users have."""
    import os

    from attack import _command
    from huggingface_hub import constants

    from adapterpack.hub.transport import client, http

    os.environ |= {"HF_ENDPOINT": address, "ADAPTERPACK_CACHE": str(Path.cwd() / "cache")}
    os.environ.pop("HF_HUB_OFFLINE", None)
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DOWNLOAD_TIMEOUT = False, 0.4  # type: ignore[assignment]
    constants.HF_HUB_CACHE = str(Path.cwd() / "models")
    client._FIRST_WAIT = client._LONGEST_WAIT = 0.01  # type: ignore[misc]
    http._GRACE = 1.0  # type: ignore[misc]
    return _command(list(arguments), "")


def pull(attacks: Attacks, hub: Host, *arguments: str) -> Outcome:
    """``adapterpack pull`` from that hub; whatever it is answered, no other host hears the token, and no cache holds it."""
    outcome = attacks.call(impatient, hub.address, *(arguments or ("pull", "hf://org/name", "-o", "out")))
    for path in attacks.work.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    return outcome


# --- the token ----------------------------------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "another port": "http://127.0.0.1:{other}/x",
    "another name": "http://localhost:{hub}/x",
    "another name and port": "http://localhost:{other}/x",
    "a name before": "http://127.0.0.1:{hub}@127.0.0.1:{other}/x",
    "a password": "http://me:pw@127.0.0.1:{other}/x",
    "digits": "http://2130706433:{hub}/x",
    "hexadecimal": "http://0x7f000001:{hub}/x",
    "fewer digits": "http://127.1:{hub}/x",
    "version six": "http://[::ffff:127.0.0.1]:{hub}/x",
    "a dot at the end": "http://localhost.:{hub}/x",
    "no scheme": "//127.0.0.1:{other}/x",
    "a backslash": "http://127.0.0.1:{other}\\@127.0.0.1:{hub}/x",
    "a fragment": "http://127.0.0.1:{other}/#@127.0.0.1:{hub}",
    "a file": "file:///etc/passwd",
    "data": "data:application/json,[]",
    "no port": "http://127.0.0.1:0/x",
    "a port that is none": "http://127.0.0.1:x/y",
    "brackets": "http://[::1/x",
    "a space": "http://127.0.0.1 :{other}/x",
    "a tab": "ht\ttp://127.0.0.1:{other}/x",
    "nothing": "http://",
    "letters of other scripts": "http://\u3002\uff11\uff12\uff17.0.0.1:{other}/x",
}


@pytest.mark.parametrize("way", ["listing", "redirect"])
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_the_token_goes_to_the_hub_alone(way: str, kind: str, hub: Host, other: Host, attacks: Attacks) -> None:
    """Where a listing goes on, and where the bytes of a file lie: other spellings of hosts are other hosts."""
    where = ELSEWHERE[kind].format(hub=hub.port, other=other.port).encode().decode("latin-1")
    hub.answers["/x"] = lambda request: request.say([])
    if way == "listing":
        hub.answers["/tree/"] = lambda request: request.say([entry("a.json")], Link=f'<{where}>; rel="next"')
    else:
        hub.answers["/resolve/"] = lambda request: request.say({}, 302, Location=where, X_Repo_Commit=COMMIT)
    pull(attacks, hub).refused(absent=attacks.work / "out")
    assert [token for _, token in other.seen if token] == []
    if kind != "a backslash":  # which the client takes for the end of a user's name, so that the hub itself is meant
        assert [path for path, token in hub.seen if path.endswith("/x") and token] == []


ECHOES = {
    "an error": lambda request, token: request.say({"error": token}, 400, X_Error_Message=token),
    "a commit": lambda request, token: request.say({"sha": token, "id": "org/name"}),
    "a name": lambda request, token: request.say({"sha": COMMIT, "id": f"org/{token[7:]}"}),
    "no JSON": lambda request, token: request.say(data=token.encode()),
    "an encoding": lambda request, token: request.say({}, Content_Encoding=token[7:]),
    "a redirect": lambda request, token: request.say({}, 302, Location=f"http://{token[7:].replace('_', '-')}/"),
    "an address": lambda request, token: request.say({}, 302, Location=f"ftp://{token[7:]}/x"),
}


@pytest.mark.parametrize("kind", ECHOES)
@pytest.mark.parametrize("where", ["/revision/", "/tree/", "/resolve/"])
def test_a_hub_that_repeats_the_token(kind: str, where: str, hub: Host, attacks: Attacks) -> None:
    hub.answers[where] = lambda request: ECHOES[kind](request, request.headers["Authorization"])
    outcome = pull(attacks, hub).refused(absent=attacks.work / "out")
    assert SECRET[7:] not in outcome.err + outcome.out


@pytest.mark.parametrize("header", ["X_Repo_Commit", "Content_Range", "X_Linked_Etag", "X_Xet_Hash"])
def test_a_header_that_repeats_the_token(header: str, hub: Host, attacks: Attacks) -> None:
    hub.answers["/resolve/"] = lambda request: request.say(
        data=PACK, status=206, **{"X_Repo_Commit": COMMIT, header: request.headers["Authorization"]})
    pull(attacks, hub).refused(absent=attacks.work / "out")


def test_a_listing_that_repeats_the_token(hub: Host, attacks: Attacks) -> None:
    hub.answers["/tree/"] = lambda request: request.say([entry(f"a/{request.headers['Authorization']}/../b")])
    pull(attacks, hub).refused(absent=attacks.work / "out")


# --- names and types ----------------------------------------------------------------------------------------------------------------------

PATHS = ["..", "../x", "a/../../x", "/etc/x", "//x", "C:/x", "c:x", "a\\b", "\\\\host\\x", "a\x00b", "a\x1b[2Jb", "a\nb", "con",
         "nul.txt", "AUX", "com1.json", "a/lpt1", "a.", "a ", "a /b", "a//b", "a/./b", "", ".", "~\u202etxt.exe", "a\u200bb", "x" * 256,
         "e\u0301", "\ud800", "ADAPTERPACK.json", "adapterpack.json/x", "a\x7fb", "a\u2028b", "x/" * 200 + "y"]


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_a_path_that_must_not_become_a_file(path: str, hub: Host, attacks: Attacks) -> None:
    hub.answers["/tree/"] = lambda request: request.say([entry("adapterpack.json", PACK), entry(path)])
    pull(attacks, hub).refused("hub lists", absent=attacks.work / "out")


ODD = {
    "a number": 7, "a large number": 2**70, "a fraction": 1e400, "a list": [[]], "text": "\x1b[2J\u202e", "nothing": None,
    "an object": {"a": {}}, "yes": True, "half a character": "\ud800", "long text": "x" * MIB,
}
FIELDS = ["sha", "id", "entries", "entry", "path", "size", "oid", "lfs.oid", "lfs.size", "type"]


def shaped(name: str, field: str, value: Any) -> tuple[Any, Any]:
    """The commit and the listing of a hub where one field is something else."""
    commit: Any = {"sha": COMMIT, "id": f"org/{name}"}
    one: dict[str, Any] = entry("adapterpack.json", PACK) | {"lfs": {"oid": "0" * 64, "size": len(PACK)}}
    listing: Any = [one]
    if field in commit:
        commit[field] = value
    elif field == "entries":
        listing = value
    elif field == "entry":
        listing = [value]
    elif field.startswith("lfs."):
        one["lfs"][field[4:]] = value
    else:
        one[field] = value
    return commit, listing


def impatient_each(address: str, count: int) -> int:
    """A pull of name0, name1, ...: 1 if each was refused."""
    codes = []
    for number in range(count):
        try:
            codes.append(impatient(address, "pull", f"hf://org/name{number}", "-o", f"out{number}"))
        except SystemExit as end:
            codes.append(end.code)
    return 1 if codes == [1] * count else 9


@pytest.mark.parametrize("kind", ODD)
def test_answers_of_other_types(kind: str, hub: Host, attacks: Attacks) -> None:
    """In every field of the commit and the listing."""
    def answer(request: Request) -> None:
        name = request.path.split("/")[4]
        commit, listing = shaped(name, FIELDS[int(name.removeprefix("name"))], ODD[kind])
        request.say(commit if "/revision/" in request.path else listing)

    hub.answers = {"/revision/": answer, "/tree/": answer}
    attacks.call(impatient_each, hub.address, len(FIELDS)).refused()
    assert not [*attacks.work.glob("out*")]


# --- size and time ------------------------------------------------------------------------------------------------------------------------


def trickles(request: Request) -> None:
    request.begin(Content_Length="100000", X_Repo_Commit=COMMIT)
    for _ in range(150):
        request.wfile.write(b" ")
        time.sleep(0.05)


def trickles_its_head(request: Request) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(150):
        request.wfile.write(b"X-%d: x\r\n" % number)
        time.sleep(0.05)


def head_without_end(request: Request) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(400_000):
        request.wfile.write(b"X-%d: " % number + b"x" * 1000 + b"\r\n")


def body_without_end(request: Request) -> None:
    request.begin(Content_Length=str(4 << 30), X_Repo_Commit=COMMIT)
    for _ in range(4 << 10):
        request.wfile.write(b" " * MIB)


@cache
def bomb(encoding: str) -> bytes:
    """Some hundred kilobytes that unpack to 64 MiB or more."""
    kinds = {"gzip": gzip.compress, "deflate": zlib.compress, "gzip, gzip": lambda data: gzip.compress(gzip.compress(data))}
    return kinds[encoding](bytes(64 * MIB)) * 16 if encoding in kinds else b"\x5b\xff\xff\x03" * 1000


def compressed(encoding: str, request: Request) -> None:
    data = bomb(encoding)
    request.begin(Content_Encoding=encoding, Content_Length=str(len(data)), X_Repo_Commit=COMMIT)
    request.wfile.write(data)


def chunks_without_end(request: Request) -> None:
    request.begin(Transfer_Encoding="chunked", X_Repo_Commit=COMMIT)
    for _ in range(4 << 10):
        request.wfile.write(b"100000\r\n" + b"[" * MIB + b"\r\n")


def circles(request: Request) -> None:
    request.say({}, 302, Location=request.path, X_Repo_Commit=COMMIT)


def longer_circles(request: Request) -> None:
    request.say({}, 307, Location=f"{request.path}x", X_Repo_Commit=COMMIT)


HOSTILE: dict[str, Callable[[Request], None]] = {
    "trickles": trickles,
    "trickles its head": trickles_its_head,
    "a head without end": head_without_end,
    "a body without end": body_without_end,
    "chunks without end": chunks_without_end,
    "gzip": partial(compressed, "gzip"),
    "deflate": partial(compressed, "deflate"),
    "br": partial(compressed, "br"),
    "zstd": partial(compressed, "zstd"),
    "gzip twice": partial(compressed, "gzip, gzip"),
    "circles": circles,
    "longer circles": longer_circles,
    "nothing": lambda request: request.connection.close(),
    "no HTTP": lambda request: request.wfile.write(b"SSH-2.0-OpenSSH\r\n" * 100),
    "busy for years": lambda request: request.say({}, 429, Retry_After="9" * 5000),
    "a wait that is none": lambda request: request.say({}, 503, Retry_After="\xb2"),
    "deep JSON": lambda request: request.say(data=b"[" * 4 * MIB),
    "a number of digits": lambda request: request.say(data=b"9" * 4 * MIB),
    "a key of megabytes": lambda request: request.say(data=b'{"' + b"x" * 8 * MIB + b'":1}'),
    "an error of escapes": lambda request: request.say({}, 400, X_Error_Message="\x1b[2J\x07 Bearer x"),
    "many cookies": lambda request: request.say([], 200, **{f"Set_Cookie_{n}": "x" for n in range(50)}),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("where", ["/tree/", "/resolve/"])
def test_answers_have_an_end(kind: str, where: str, hub: Host, attacks: Attacks) -> None:
    hub.answers[where] = HOSTILE[kind]
    pull(attacks, hub).refused(absent=attacks.work / "out")


def pages(kind: str) -> Callable[[Request], None]:
    """Listings that go on for ever."""
    def page(request: Request) -> None:
        number = len(request.server.seen)
        entries = {"empty": [], "folders": [{"type": "directory", "path": "a", "oid": "0" * 40, "size": 0}] * 1000,
                   "one file": [entry(f"f{number}.json")] * 1, "the same": [entry("a.json")],
                   "files": [entry(f"f{number}-{n}.json") for n in range(1000)],
                   "cookies": [entry(f"f{number}.json")]}[kind]
        cookies = {"Set_Cookie": f"c{number}={'x' * 60_000}"} if kind == "cookies" else {}
        request.say(entries, Link=f'<{request.path}&n={number}>; rel="next"', **cookies)

    return page


@pytest.mark.parametrize("kind", ["empty", "folders", "files", "the same", "cookies"])
def test_a_listing_without_end(kind: str, hub: Host, attacks: Attacks) -> None:
    hub.answers["/tree/"] = pages(kind)
    pull(attacks, hub).refused(absent=attacks.work / "out")


# --- bytes --------------------------------------------------------------------------------------------------------------------------------


def base_of(address: str) -> int:
    """A base of that hub, which the official client fetches."""
    from adapterpack.hub.resolve import folder_of

    with suppress(SystemExit):
        impatient(address, "--version")
    folder_of("hf://org/name")
    return 0


OUT = "../../../../outside/planted"
HEADERS = {
    "an etag": {"ETag": f'"{OUT}"'}, "a linked etag": {"ETag": '"a"', "X_Linked_Etag": f'"{OUT}"', "X_Linked_Size": "2"},
    "an etag of root": {"ETag": '"/nowhere/planted"'}, "a commit": {"ETag": '"a"', "X_Repo_Commit": OUT},
    "a long etag": {"ETag": '"' + "x" * 5000 + '"'}, "dots": {"ETag": '".."'}, "a control character": {"ETag": '"a\x1b[2J"'},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_no_header_becomes_a_path(kind: str, hub: Host, attacks: Attacks) -> None:
    """The official client names what it keeps by headers."""
    hub.answers = {
        "/revision/": lambda request: request.say({"sha": COMMIT, "id": "org/name", "siblings": [{"rfilename": "config.json"}]}),
        "/tree/": lambda request: request.say([entry("config.json")]),
        "/resolve/": lambda request: request.say(data=b"{}", **{"X_Repo_Commit": COMMIT, **HEADERS[kind]}),
    }
    attacks.call(base_of, hub.address).refused()
    assert not [*attacks.work.parent.rglob("*planted*")]


def changing(kind: str) -> Callable[[Request], None]:
    """The bytes of a manifest that was listed as something else."""
    def resolve(request: Request) -> None:
        head = {"X_Repo_Commit": COMMIT}
        if kind == "other bytes":
            request.say(data=PACK[::-1], **head)
        elif kind == "fewer":
            request.say(data=PACK[:-1], **head)
        elif kind == "more":
            request.say(data=PACK + b" ", **head)
        elif kind == "more, without a length":
            request.begin(Connection="close", **head)
            for _ in range(3000):
                request.wfile.write(b" " * MIB)
        elif kind == "another commit":
            request.say(data=PACK, X_Repo_Commit="f" * 40)
        elif kind == "a part":
            request.say(data=PACK[1:], status=206, Content_Range=f"bytes 1-{len(PACK) - 1}/{len(PACK)}", **head)
        elif kind == "an empty part":
            request.say(data=b"", status=206, Content_Range="bytes */0", **head)
        elif kind == "nothing and no content":
            request.begin(204, **head)
        else:  # it stalls at the last byte
            request.begin(Content_Length=str(len(PACK)), **head)
            request.wfile.write(PACK[:-1])
            time.sleep(3)

    return resolve


@pytest.mark.parametrize("kind", ["other bytes", "fewer", "more", "more, without a length", "another commit", "a part", "an empty part",
                                  "nothing and no content", "the last byte never comes"])
def test_bytes_that_were_not_listed(kind: str, hub: Host, attacks: Attacks) -> None:
    hub.answers["/resolve/"] = changing(kind)
    pull(attacks, hub).refused(absent=attacks.work / "out")
    assert not [*attacks.work.rglob("adapterpack.json")]
