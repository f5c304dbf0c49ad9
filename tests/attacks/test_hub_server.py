"""Attacks on a hub: requests of strangers, made up in hundreds, to a real hub in a process of its own."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from adapterpack.hub.server.app import ROUTES
from adapterpack.hub.server.collecting import KEPT_SECONDS, Collector
from adapterpack.hub.server.parts import Parts
from adapterpack.hub.server.storage import Storage
from adapterpack.hub.server.trees import Entry

WRITE, READ = "hf_writerwriterwriterwriter", "hf_readerreaderreaderreader"
MIB = 1 << 20
PROGRAM = """
import sys
from adapterpack.hub.server import bodies, protocol, serve
protocol.HEAD_SECONDS = bodies.PAUSE_SECONDS = 1.0
serve.serve(sys.argv[1], port=0, tokens=sys.argv[2], ready=lambda address: print(address, flush=True))
"""
"""A hub that is as it is, but that its clients have a second where they have twenty or sixty."""


@dataclass(frozen=True)
class Answer:
    """One answer as it came: status (0 for none), head and body."""

    status: int
    head: str
    body: bytes

    @property
    def code(self) -> str:
        """The name that clients know an error by."""
        match = re.search(r"(?im)^x-error-code: (.*?)\r?$", self.head)
        return match[1] if match else ""


@dataclass(frozen=True)
class Server:
    """A hub: where it is, its process, its folder and what it logs."""

    address: tuple[str, int]
    process: subprocess.Popen[str]
    folder: Path
    log: Path

    def raw(self, data: bytes, timeout: float = 6.0) -> Answer:
        """The answer to these bytes on a connection of their own."""
        with socket.create_connection(self.address, timeout=timeout) as connection:
            answer = bytearray()
            with suppress(OSError):  # it hung up, and may have said why
                connection.sendall(data)
            try:
                while more := connection.recv(1 << 16):
                    answer += more
            except ConnectionError:
                pass
        head, _, body = bytes(answer).partition(b"\r\n\r\n")
        return Answer(int(head.split()[1]) if head else 0, head.decode("latin-1"), body)

    def ask(self, method: str, path: str, body: bytes | dict[str, object] = b"", token: str | None = WRITE,
            headers: tuple[str, ...] = ()) -> Answer:
        """The answer to one request, written as it is here."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        host = () if any(header.lower().startswith("host:") for header in headers) else ("Host: hub",)
        lines = [f"{method} {path} HTTP/1.1", *host, "Connection: close", *headers]
        lines += [f"Content-Length: {len(data)}"] if data else []
        lines += [f"Authorization: Bearer {token}"] if token else []
        return self.raw("\r\n".join([*lines, "", ""]).encode("latin-1") + data)

    def memory(self) -> int:
        """The most that the process ever had, in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    def files(self) -> int:
        """The files and connections that the process has open."""
        return len([*Path(f"/proc/{self.process.pid}/fd").iterdir()])

    def require_sound(self) -> None:
        """It answers, soon, and has logged no error since it was last looked at."""
        started = time.monotonic()
        assert self.ask("GET", "/api/whoami-v2").status == 200
        assert time.monotonic() - started < 2
        text = self.log.read_text()
        self.log.write_text("")
        assert "Traceback" not in text, text[-3000:]


def commit(*operations: dict[str, object], parent: object = None) -> bytes:
    header = {"key": "header", "value": {"summary": "s", "description": "", "parentCommit": parent}}
    return b"\n".join(json.dumps(line).encode() for line in (header, *operations))


def file(path: object, content: bytes = b"x") -> dict[str, object]:
    return {"key": "file", "value": {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "tokens").write_text(f"ann write {WRITE}\nbob read {READ}\n")
    (folder / "tokens").chmod(0o600)
    command = [sys.executable, "-c", PROGRAM, str(folder / "data"), str(folder / "tokens")]
    with (folder / "log").open("a") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        host, _, port = process.stdout.readline().strip().removeprefix("http://").partition(":")
        running = Server((host, int(port)), process, folder / "data", folder / "log")
        for name, private in (("open", False), ("hidden", True)):
            assert running.ask("POST", "/api/repos/create", {"name": name, "organization": "org", "private": private}).status == 200
            assert running.ask("POST", f"/api/models/org/{name}/commit/main", commit(file("a.json"), file("b/c.json"))).status == 200
        yield running
        process.kill()


# --- no input is an error of the server ---------------------------------------------------------------------------------------------------

PARTS = ["org", "open", "hidden", "main", "..", ".", "", "%2e%2e", "%2F", "a%2Fb", "%00", "%0d%0a", "%ff%fe", "%ed%a0%80", "%C3%A9",
         "con", "x" * 300,
         "x" * 5000, "refs%2Fpr%2F1", "refs/pr/-1", "0" * 40, "f" * 64, "a.json", "b", "b/c.json", "b%2Fc.json", "*", "~", "{org}", "%",
         "%zz", "-1",
         "9" * 400, "a;b", "a?b", "a&b", "'", "org.git", "open.git", "@", ":", "[", "%5C", "//", "%E2%80%AE", ".lock", "HEAD"]
QUERIES = ["", "", "?", "?recursive=true", "?recursive=true&limit=1", "?limit=-1", "?limit=1e9", "?limit=" + "9" * 5000, "?cursor=-1",
           "?cursor=x",
           "?cursor=%ff", "?cursor=" + "z" * 3000, "?cursor=%F0%9F%98%80", "?limit=1&limit=2", "?expand=true&expand[]=sha", "?blobs=1",
           "?author=%ff",
           "?create_pr=1", "?size=1&until=1&signature=0", f"?size={'9' * 15}&until=9999999999&signature={'0' * 64}", "?%", "?=&==&&",
           "?limit=%D9%A1"]
VALUES = [b"", b"{}", b"[]", b"null", b"1", b'"x"', b"{", b"\xff\xfe{\x00}\x00", b"{" * 5000, b"[" * 100_000, b'{"a":' * 2000,
          b'{"a":1,"a":2}',
          b'{"name":null}', b'{"files":1}', b'{"files":[1]}', b'{"files":[{"path":1,"size":1}]}', b'{"files":[{"path":"a","size":-1}]}',
          b'{"files":[{"path":"a","size":true,"sample":7}]}', b'{"files":[{"path":"a","size":1e999}]}', b'{"objects":[[]]}',
          b'{"objects":{"a":1}}', b'{"objects":[{"oid":[],"size":"1"}]}', b'{"objects":[],"transfers":7}',
          b'{"objects":[],"transfers":{"a":1}}',
          b'{"parts":[{"partNumber":"1","etag":{}}]}', b'{"tag":null}', b'{"tag":7}', b'{"tag":"a\\u0000b"}', b'{"tag":"\\ud800"}',
          b'{"startingPoint":{}}', b'{"startingPoint":["main"]}', b'{"startingPoint":"' + b"x" * 5000 + b'"}', b'{"gated":[]}',
          b'{"gated":{"a":1}}',
          b'{"private":"yes"}', b'{"visibility":[]}', b'{"user":{}}', b'{"user":"\\ud83d"}', b'{"content":7}',
          b'{"content":"---\\n' + b"[" * 9000 + b'"}',
          b'{"content":"---\\na: !!python/object:os.system x\\n---"}', b'{"content":"---\\n? ? ? x\\n---"}',
          b"paths=a&paths=%ff&paths=b/c.json", b"paths=" * 30_000,
          commit(), commit(file(7)), commit(file(["a"])), commit(file("../x")), commit(file("a/../b")), commit(file("con")),
          commit(file("x" * 300)),
          commit(file("a\0b")), commit({"key": "file", "value": []}), commit({"key": [], "value": {}}), commit({"key": "lfsFile",
                                                                                                                "value": {"path": "a",
                                                                                                                          "oid": 7}}),
          commit({"key": "lfsFile", "value": {"path": "a", "oid": "0" * 64}}), commit({"key": "file", "value": {"path": "a",
                                                                                                                "content": {}}}),
          commit({"key": "deletedFile", "value": {"path": ["x"]}}), commit({"key": "deletedFolder", "value": {}}), commit({"key": "exec",
                                                                                                                           "value": {}}),
          commit(parent=[]), commit(parent={"a": 1}), commit(file("a.json/b")), commit(file("b")), b"\n" * 200_000, b"1\n2\n3",
          b'{"key":"header","value":7}', b'{"key":"header"}', b'{"value":{}}', b"\x00" * 100]
HEADERS = ["Host: [::1", "Host: ", "Host: a b", "Host: \"><script>", "Host: evil@hub", "Host: hub:99999999", "Host: \xe9",
           "Host: " + "h" * 9000, "Host: /", "Host: hub/../x",
           "Range: bytes=0-0", "Range: bytes=-1", "Range: bytes=5-2", "Range: bytes=99-", "Range: bytes=x", "Range: lines=1-2",
           "Range: bytes=" + "0-0," * 1500,
           "Range: bytes=" + "9" * 5000 + "-", "Range: bytes=\xb2-", "If-Range: x", "If-None-Match: *", "If-Modified-Since: never",
           "Authorization: Bearer",
           "Authorization: Basic \xe9", "Authorization: Bearer \xff\xfe", "Authorization: " + "x" * 9000,
           "Content-Type: multipart/form-data", "Content-Type: \xff",
           "X-Forwarded-Proto: javascript", "X-Forwarded-For: \xff, 1, [", "X-Forwarded-Host: evil", "Upgrade: websocket",
           "Connection: upgrade\r\nUpgrade: websocket",
           "Connection: upgrade\r\nUpgrade: h2c", "Expect: x", "Accept-Encoding: br;q=\xff", "Cookie: " + "a=b;" * 2000,
           "Content-Encoding: gzip",
           "Accept: " + "*/*," * 2000, "X-\x7f: 1", "Content-Length: -1", "Content-Length: 1, 2", "Content-Length: \xb2",
           "Content-Length: 99999999999999999999",
           "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked\r\nContent-Length: 5",
           "Range: bytes=0-0\r\nRange: bytes=1-1"]


def filled(path: str, random_: random.Random) -> str:
    """A route's path with something in each place."""
    return re.sub(r"\{[^}]*\}", lambda match: random_.choice(PARTS), path)


PLACES = {"org": "org", "name": "open", "rev": "main", "path:path": "a.json", "sha256": "0" * 64, "number": "1"}


def sensible(path: str) -> str:
    return re.sub(r"\{([^}]*)\}", lambda match: PLACES[match[1]], path)


def answered(server: Server, answers: list[tuple[str, Answer]], least: int) -> None:
    """Each of them was an answer, and none an error of the server."""
    assert len(answers) >= least
    assert [(asked[:300], answer.head) for asked, answer in answers if not 200 <= answer.status < 500] == []
    assert [asked for asked, answer in answers if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", answer.head)] == []
    server.require_sound()


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE"])
def test_paths_that_strangers_make_up(method: str, server: Server) -> None:
    """Every route with odd names in every place, and with queries that are none."""
    random_ = random.Random(method)
    asked = [filled(route.path, random_) + random_.choice(QUERIES) for route in ROUTES for _ in range(12)]
    answered(server, [(path, server.ask(method, path, token=random_.choice([None, READ, WRITE]))) for path in asked], 250)


@pytest.mark.parametrize("method", ["OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW", "get", "X" * 200])
def test_methods_that_no_route_has(method: str, server: Server) -> None:
    asked = [*(sensible(route.path) for route in ROUTES), "/", "*", "//", "http://elsewhere/api/models", "/api/models/", "//evil/%2e%2e"]
    answers = [(path, server.ask(method, path)) for path in asked]
    answered(server, answers, 25)
    assert {answer.status for _, answer in answers} <= {400, 404, 405}
    assert not any("location:" in answer.head.lower() for _, answer in answers)


@pytest.mark.parametrize("route", [route for route in ROUTES if route.method in {"POST", "PUT"}],
                         ids=lambda route: f"{route.method} {route.path}")
def test_bodies_that_are_none(route: object, server: Server) -> None:
    """Wrong types, too deep, cut, in another encoding: as whoever may write."""
    from adapterpack.hub.server.app import RouteSpec

    assert isinstance(route, RouteSpec)
    path = sensible(route.path).replace("/branch/main", "/branch/new")
    answered(server, [(repr(value[:80]), server.ask(route.method, path, value)) for value in VALUES], 60)


@pytest.mark.parametrize("path", ["/api/models", "/api/models/org/open", "/api/models/org/open/tree/main?limit=1",
                                  "/org/open/resolve/main/a.json",
                                  "/api/models/org/open/paths-info/main", "/api/repos/create", "/org/open.git/info/lfs/objects/batch"])
def test_headers_that_are_none(path: str, server: Server) -> None:
    """Hosts, ranges, lengths, encodings and upgrades that no client would send."""
    method = "POST" if path.endswith(("paths-info/main", "create", "batch")) else "GET"
    answered(server, [(header, server.ask(method, path, token=None if "Authorization" in header else WRITE, headers=(header,)))
                      for header in HEADERS], 45)


def test_bytes_that_are_no_http(server: Server) -> None:
    random_ = random.Random(3)
    asked = [random_.randbytes(random_.randrange(1, 3000)) + b"\r\n\r\n" for _ in range(150)]
    asked += [b"\r\n" * 50 + b"GET / HTTP/1.1\r\n\r\n", b"GET  / HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\n\r\n",
              b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
              b"GET / HTTP/1.1\r\nA\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
              b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
              b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n", b"GET /" + b"x" * MIB + b" HTTP/1.1\r\n\r\n",
              b"POST /api/repos/create HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
              b"GET \xff HTTP/1.1\r\nHost: a\r\n\r\n"]
    assert {server.raw(data).status for data in asked} <= {0, 400, 404, 401}
    server.require_sound()


def test_requests_of_nobody_do_no_work(server: Server) -> None:
    """Every route that writes refuses before it reads: what its body would be does not matter, nor whether the repository is there."""
    for route in (route for route in ROUTES if route.writes):
        path, large = sensible(route.path), b"x" * (300 << 10)
        assert {server.ask(route.method, path, large, token=token).status for token in (None, READ)} <= {401, 403}
    server.require_sound()


@pytest.mark.parametrize("token", [None, "hf_" + "x" * 24], ids=["nobody", "wrong token"])
def test_what_is_private_is_answered_as_if_it_were_not_there(token: str | None, server: Server) -> None:
    """On every route, with every method: status, headers and body, and about as soon."""
    seconds = {"hidden": 0.0, "absent": 0.0}
    for route in (route for route in ROUTES if "{name}" in route.path):
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
            answers = set()
            for name in seconds:
                started = time.perf_counter()
                answer = server.ask(method, sensible(route.path).replace("open", name), b"{}" if method in {"POST", "PUT"} else b"", token)
                seconds[name] += time.perf_counter() - started
                answers.add((answer.status, re.sub("(?m)^date: .*$", "", answer.head), answer.body))
            assert len(answers) == 1, answers
            assert min(answers)[0] in {401, 405, 404}
    assert max(seconds.values()) < 2 * min(seconds.values()) + 0.05


def test_an_address_for_uploads_that_was_made_up_or_altered(server: Server) -> None:
    sha256 = "ab" * 32
    value = {"operation": "upload", "objects": [{"oid": sha256, "size": 3}], "transfers": ["basic"]}
    [one] = json.loads(server.ask("POST", "/org/open.git/info/lfs/objects/batch", value).body)["objects"]
    address = one["actions"]["upload"]["href"].partition("/lfs/")[2]
    good = f"/lfs/{address}"
    altered = [good.replace("size=3", "size=4"), good.replace("until=", "until=1"), good.replace("signature=", "signature=0"),
               good.replace(sha256, "cd" * 32), good.replace(sha256, f"{sha256}/1"), good.replace(sha256, sha256.upper()), good + "&size=4",
               good.replace(sha256, "..%2f..%2fx"), good.replace("?", "?signature=0&"), good.replace("signature=", "Signature=")]
    answers = [(path, server.ask("PUT", path, b"abc", token=None)) for path in altered]
    answered(server, answers, 10)
    assert {answer.status for _, answer in answers} <= {400, 403, 404}
    assert server.ask("PUT", good, b"xyz", token=None).status == 400, "other bytes than were announced"
    assert not [*(server.folder / "blobs").glob(f"*/{sha256}")]


@pytest.mark.parametrize("range_", ["bytes=" + ",".join(f"{n}-" for n in range(500)), "bytes=0-,0-,0-", "bytes=" + ",".join(["0-9"] * 900)],
                         ids=["many", "three times all", "one many times"])
def test_a_file_is_sent_once_however_many_ranges_are_wanted(range_: str, server: Server) -> None:
    assert server.ask("POST", "/api/models/org/open/commit/main", commit(file("big.txt", b"x" * MIB))).status == 200
    answer = server.ask("GET", "/org/open/resolve/main/big.txt", headers=(f"Range: {range_}",))
    assert answer.status in {200, 400, 416}
    assert len(answer.body) <= MIB


NAMES = ["con", "nul", "AUX", "com1", "lpt9.txt", "a.", "a ", "..", "a..b", "-a", "a" * 97, "a/b", "a\\b", "a:b", "\u202e", "", ".git",
         "x.git"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_file_systems_keep_for_themselves(name: str, server: Server) -> None:
    """Neither a repository, nor a branch, a tag or a user has one; nor a file, where it is a name of that kind."""
    before = sorted(path.name for path in (server.folder / "repos").glob("*/*"))
    refused = [server.ask("POST", "/api/repos/create", {"name": name, "organization": "org"}),
               server.ask("POST", "/api/repos/create", {"name": "fine", "organization": name}) if name != "x.git" else None,
               server.ask("POST", "/api/models/org/open/tag/main", {"tag": name}) if name not in {"a/b", "-a", "a" * 97, "x.git"} else None]
    if name not in {"a/b", "a..b", "-a", "a" * 97, ".git", "x.git"}:
        refused.append(server.ask("POST", "/api/models/org/open/commit/main", commit(file(name))))
    assert {answer.status for answer in refused if answer is not None} <= {400, 404}
    assert sorted(path.name for path in (server.folder / "repos").glob("*/*")) == before


@pytest.mark.parametrize("paths", [["a", "A"], ["stra\u00dfe", "STRASSE"], ["d", "d/e"], ["D/x", "d"], ["d/e/f", "D/E"]], ids=str)
def test_paths_that_are_one_file_on_some_systems(paths: list[str], server: Server) -> None:
    answer = server.ask("POST", "/api/models/org/hidden/commit/main", commit(*map(file, paths)))
    assert (answer.status, b"one file on some systems" in answer.body) == (400, True)


BODIES = {
    "a number without end": b'{"name":1' + b"0" * (900 << 10) + b"}",
    "lines without end": b"\n" * (60 * MIB),
    "a list of lists": b'{"files":[' + b"[]," * (1 * MIB) + b"[]]}",
    "keys": b'{"a":{' + b",".join(b'"%d":1' % n for n in range(90_000)) + b"}}",
    "escapes": b'{"content":"' + b"\\u00e9" * (600 << 10) + b'"}',
    "YAML": json.dumps({"content": "---\n" + "a: &a [x]\n" + "b: [*a]\n" * 20_000 + "\n---"}).encode(),
    "operations": b'{"key":"header","value":{}}\n' + b'{"key":"file","value":{"path":"a"}}\n' * 200_000,
    "base64": commit(file("big", b"x" * (40 * MIB))),
}


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_of_writers_are_bounded(kind: str, server: Server) -> None:
    """A few seconds and some hundred megabytes at most, with a token that may write."""
    before, started = server.memory(), time.monotonic()
    path = "/api/validate-yaml" if kind in {"YAML", "escapes"} else "/api/models/org/open/commit/main"
    path = {"a list of lists": "/api/models/org/open/preupload/main", "a number without end": "/api/repos/create"}.get(kind, path)
    answered(server, [(kind, server.ask("POST", path, BODIES[kind]))], 1)
    assert time.monotonic() - started < 6
    assert server.memory() - before < 400 * MIB


# --- clients that keep it waiting ---------------------------------------------------------------------------------------------------------

def half(number: int) -> bytes:
    """The beginning of a request that does not go on."""
    kinds = [b"", b"G", b"GET /api/models HTTP/1.1\r\nHost: hub\r\nX-A: ", b"GET /api/whoami-v2 HTTP/1.1\r\nHost: hub\r\n\r\nGET /api/",
             b"POST /api/models/org/open/paths-info/main HTTP/1.1\r\nHost: hub\r\nContent-Length: 1000\r\n\r\nabc",
             b"GET /org/open/resolve/main/large.txt HTTP/1.1\r\nHost: hub\r\n\r\n" * 4]
    return kinds[number % len(kinds)]


@pytest.fixture(scope="module")
def large(server: Server) -> str:
    """A file that does not fit into the buffers of a socket."""
    assert server.ask("POST", "/api/models/org/open/commit/main", commit(file("large.txt", b"x" * (9 * MIB)))).status == 200
    return "large.txt"


@pytest.mark.parametrize("count", [300, 700])
def test_connections_on_which_nothing_goes_on(count: int, server: Server, large: str) -> None:
    """More than it may have: others are answered at once, and its files are not used up."""
    with ExitStack() as stack:
        for number in range(count):
            connection = stack.enter_context(socket.create_connection(server.address, timeout=10))
            with suppress(OSError):  # room was made
                connection.sendall(half(number))
            if number % 50 == 49:
                started = time.monotonic()
                assert server.ask("GET", "/api/models/org/open/tree/main").status == 200
                assert time.monotonic() - started < 2
        assert server.files() < 800
    server.require_sound()


def seconds_until_closed(server: Server, start: bytes, drip: bytes = b"") -> float:
    """How long the hub lets a client of that kind wait; the client sends a little more now and then, and reads nothing until the end."""
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(start)
        started = time.monotonic()
        while time.monotonic() - started < 9:
            time.sleep(0.2)
            try:
                if drip:
                    connection.sendall(drip)
                else:
                    connection.setblocking(False)
                    try:
                        if not connection.recv(1, socket.MSG_PEEK):
                            break
                    except BlockingIOError:
                        pass
            except OSError:
                break
        return time.monotonic() - started


WAITING = {
    "nothing": (b"", b""),
    "a head that trickles": (b"GET /api/models HTTP/1.1\r\nHost: hub\r\n", b"X-A: b\r\n"),
    "a second head that trickles": (b"GET /api/whoami-v2 HTTP/1.1\r\nHost: hub\r\n\r\nGET /", b"x"),
    "a body that trickles": (b"POST /api/models/org/open/paths-info/main HTTP/1.1\r\nHost: hub\r\nContent-Length: 90000\r\n\r\n", b"a"),
    "chunks that trickle": (b"POST /api/models/org/open/paths-info/main HTTP/1.1\r\nHost: hub\r\nTransfer-Encoding: chunked\r\n\r\n",
                            b"1\r\na\r\n"),
    "an answer that nobody reads": (b"GET /org/open/resolve/main/large.txt HTTP/1.1\r\nHost: hub\r\n\r\n", b""),
}


@pytest.mark.parametrize("kind", WAITING)
def test_a_client_that_keeps_the_hub_waiting_is_sent_away(kind: str, server: Server, large: str) -> None:
    before = server.files()
    if kind == "an answer that nobody reads":
        with socket.create_connection(server.address, timeout=10) as connection:
            connection.sendall(WAITING[kind][0])
            until = time.monotonic() + 8
            time.sleep(0.3)
            assert server.files() > before
            while server.files() > before and time.monotonic() < until:
                time.sleep(0.1)
            assert server.files() <= before
    else:
        assert seconds_until_closed(server, *WAITING[kind]) < 6
    server.require_sound()


# --- many files ---------------------------------------------------------------------------------------------------------------------------

MANY = 100_000


def update(more: dict[str, Entry], files: dict[str, Entry]) -> None:
    files.update(more)


@pytest.fixture(scope="module")
def many(server: Server) -> str:
    """A repository of as many files as one may have, from five commits, made by another process that serves the same folder."""
    server.ask("POST", "/api/repos/create", {"name": "many", "organization": "org"})
    storage = Storage(server.folder)
    entry = storage.keep_bytes(b"x")
    for start in range(0, MANY, 20_000):
        more = {f"d{number // 500:03}/f{number:06}.json": entry for number in range(start, start + 20_000)}
        storage.change("org/many", "main", "ann", "", "", parent=None, change=partial(update, more), as_pr=False)
    return "/api/models/org/many"


WANTED = {
    "a page": "/api/models/org/many/tree/main?recursive=true",
    "the last page": "/api/models/org/many/tree/main?recursive=true&cursor=d199/f0999",
    "folders": "/api/models/org/many/tree/main",
    "one folder": "/api/models/org/many/tree/main/d100",
    "the commit": "/api/models/org/many/revision/main",
    "a file": "/org/many/resolve/main/d123/f061500.json",
    "no file": "/org/many/resolve/main/d123/x",
    "repositories": "/api/models",
}


@pytest.mark.parametrize("kind", WANTED)
def test_a_repository_of_very_many_files_costs_a_page(kind: str, server: Server, many: str) -> None:
    before, started = server.memory(), time.monotonic()
    answers = [server.ask("GET", WANTED[kind], token=None) for _ in range(3)]
    assert time.monotonic() - started < 3 * 0.5
    assert server.memory() - before < 32 * MIB
    assert {answer.status for answer in answers} == {404 if kind == "no file" else 200}
    assert len(answers[0].body) < 512 << 10


def test_a_repository_has_no_more_files_than_that(server: Server, many: str) -> None:
    answer = server.ask("POST", f"{many}/commit/main", commit(file("one more")))
    assert (answer.status, answer.code) == (413, "TooLarge")


def test_what_nobody_finished_or_named_goes_and_nothing_else(tmp_path: Path) -> None:
    """Parts, files that were arriving, blobs of refused commits: after a day; what a commit of any time names stays."""
    storage = Storage(tmp_path)
    storage.create("org/name", private=False, author="ann")
    kept, orphan, taken = (storage.keep_bytes(text) for text in (b"kept", b"orphan", b"taken again"))
    first = storage.change("org/name", "main", "ann", "", "", parent=None, change=lambda files: files.update(a=kept), as_pr=False)[0]
    storage.change("org/name", "main", "ann", "", "", parent=None, change=lambda files: files.clear(), as_pr=False)
    parts = Parts(storage)
    (tmp_path / "tmp" / "parts" / ("0" * 64)).mkdir()
    (tmp_path / "tmp" / "left").write_bytes(b"x")
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    assert storage.renewed(taken.sha256)
    (tmp_path / "tmp" / "arriving").write_bytes(b"x")
    assert Collector(storage, parts).collect() == 1
    assert not storage.blob(orphan.sha256).exists()
    assert storage.blob(taken.sha256).read_bytes() == b"taken again"
    assert storage.blob(storage.commit("org/name", first).files["a"].sha256).read_bytes() == b"kept"
    assert sorted(path.name for path in (tmp_path / "tmp").iterdir()) == ["arriving", "parts"]
    assert not [*(tmp_path / "tmp" / "parts").iterdir()]
    assert KEPT_SECONDS == 86_400
