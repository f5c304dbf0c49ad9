"""Attacks on a hub: requests of strangers, made up in hundreds, to a real hub in a process of its own."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
from attacked_hub import MIB, READ, WRITE, Server, answered, commit, file

from adapterpack.hub.server.app import ROUTES

# --- no input is an error of the server ---------------------------------------------------------------------

PARTS = [
    "org",
    "open",
    "hidden",
    "main",
    "..",
    ".",
    "",
    "%2e%2e",
    "%2F",
    "a%2Fb",
    "%00",
    "%0d%0a",
    "%ff%fe",
    "%ed%a0%80",
    "%C3%A9",
    "con",
    "x" * 300,
    "x" * 5000,
    "refs%2Fpr%2F1",
    "refs/pr/-1",
    "0" * 40,
    "f" * 64,
    "a.json",
    "b",
    "b/c.json",
    "b%2Fc.json",
    "*",
    "~",
    "{org}",
    "%",
    "%zz",
    "-1",
    "9" * 400,
    "a;b",
    "a?b",
    "a&b",
    "'",
    "org.git",
    "open.git",
    "@",
    ":",
    "[",
    "%5C",
    "//",
    "%E2%80%AE",
    ".lock",
    "HEAD",
]
QUERIES = [
    "",
    "",
    "?",
    "?recursive=true",
    "?recursive=true&limit=1",
    "?limit=-1",
    "?limit=1e9",
    "?limit=" + "9" * 5000,
    "?cursor=-1",
    "?cursor=x",
    "?cursor=%ff",
    "?cursor=" + "z" * 3000,
    "?cursor=%F0%9F%98%80",
    "?limit=1&limit=2",
    "?expand=true&expand[]=sha",
    "?blobs=1",
    "?author=%ff",
    "?create_pr=1",
    "?size=1&until=1&signature=0",
    f"?size={'9' * 15}&until=9999999999&signature={'0' * 64}",
    "?%",
    "?=&==&&",
    "?limit=%D9%A1",
]
VALUES = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"1",
    b'"x"',
    b"{",
    b"\xff\xfe{\x00}\x00",
    b"{" * 5000,
    b"[" * 100_000,
    b'{"a":' * 2000,
    b'{"a":1,"a":2}',
    b'{"name":null}',
    b'{"files":1}',
    b'{"files":[1]}',
    b'{"files":[{"path":1,"size":1}]}',
    b'{"files":[{"path":"a","size":-1}]}',
    b'{"files":[{"path":"a","size":true,"sample":7}]}',
    b'{"files":[{"path":"a","size":1e999}]}',
    b'{"objects":[[]]}',
    b'{"objects":{"a":1}}',
    b'{"objects":[{"oid":[],"size":"1"}]}',
    b'{"objects":[],"transfers":7}',
    b'{"objects":[],"transfers":{"a":1}}',
    b'{"parts":[{"partNumber":"1","etag":{}}]}',
    b'{"tag":null}',
    b'{"tag":7}',
    b'{"tag":"a\\u0000b"}',
    b'{"tag":"\\ud800"}',
    b'{"startingPoint":{}}',
    b'{"startingPoint":["main"]}',
    b'{"startingPoint":"' + b"x" * 5000 + b'"}',
    b'{"gated":[]}',
    b'{"gated":{"a":1}}',
    b'{"private":"yes"}',
    b'{"visibility":[]}',
    b'{"user":{}}',
    b'{"user":"\\ud83d"}',
    b'{"content":7}',
    b'{"content":"---\\n' + b"[" * 9000 + b'"}',
    b'{"content":"---\\na: !!python/object:os.system x\\n---"}',
    b'{"content":"---\\n? ? ? x\\n---"}',
    b"paths=a&paths=%ff&paths=b/c.json",
    b"paths=" * 30_000,
    commit(),
    commit(file(7)),
    commit(file(["a"])),
    commit(file("../x")),
    commit(file("a/../b")),
    commit(file("con")),
    commit(file("x" * 300)),
    commit(file("a\0b")),
    commit({"key": "file", "value": []}),
    commit({"key": [], "value": {}}),
    commit({"key": "lfsFile", "value": {"path": "a", "oid": 7}}),
    commit({"key": "lfsFile", "value": {"path": "a", "oid": "0" * 64}}),
    commit({"key": "file", "value": {"path": "a", "content": {}}}),
    commit({"key": "deletedFile", "value": {"path": ["x"]}}),
    commit({"key": "deletedFolder", "value": {}}),
    commit({"key": "exec", "value": {}}),
    commit(parent=[]),
    commit(parent={"a": 1}),
    commit(file("a.json/b")),
    commit(file("b")),
    b"\n" * 200_000,
    b"1\n2\n3",
    b'{"key":"header","value":7}',
    b'{"key":"header"}',
    b'{"value":{}}',
    b"\x00" * 100,
]
HEADERS = [
    "Host: [::1",
    "Host: ",
    "Host: a b",
    'Host: "><script>',
    "Host: evil@hub",
    "Host: hub:99999999",
    "Host: \xe9",
    "Host: " + "h" * 9000,
    "Host: /",
    "Host: hub/../x",
    "Range: bytes=0-0",
    "Range: bytes=-1",
    "Range: bytes=5-2",
    "Range: bytes=99-",
    "Range: bytes=x",
    "Range: lines=1-2",
    "Range: bytes=" + "0-0," * 1500,
    "Range: bytes=" + "9" * 5000 + "-",
    "Range: bytes=\xb2-",
    "If-Range: x",
    "If-None-Match: *",
    "If-Modified-Since: never",
    "Authorization: Bearer",
    "Authorization: Basic \xe9",
    "Authorization: Bearer \xff\xfe",
    "Authorization: " + "x" * 9000,
    "Content-Type: multipart/form-data",
    "Content-Type: \xff",
    "X-Forwarded-Proto: javascript",
    "X-Forwarded-For: \xff, 1, [",
    "X-Forwarded-Host: evil",
    "Upgrade: websocket",
    "Connection: upgrade\r\nUpgrade: websocket",
    "Connection: upgrade\r\nUpgrade: h2c",
    "Expect: x",
    "Accept-Encoding: br;q=\xff",
    "Cookie: " + "a=b;" * 2000,
    "Content-Encoding: gzip",
    "Accept: " + "*/*," * 2000,
    "X-\x7f: 1",
    "Content-Length: -1",
    "Content-Length: 1, 2",
    "Content-Length: \xb2",
    "Content-Length: 99999999999999999999",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 5",
    "Range: bytes=0-0\r\nRange: bytes=1-1",
]


def filled(path: str, random_: random.Random) -> str:
    """A route's path with something in each place."""
    return re.sub(r"\{[^}]*\}", lambda match: random_.choice(PARTS), path)


PLACES = {
    "org": "org",
    "name": "open",
    "rev": "main",
    "path:path": "a.json",
    "sha256": "0" * 64,
    "number": "1",
}


def sensible(path: str) -> str:
    return re.sub(r"\{([^}]*)\}", lambda match: PLACES[match[1]], path)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE"])
def test_paths_that_strangers_make_up(method: str, server: Server) -> None:
    """Every route with odd names in every place, and with queries that are none."""
    random_ = random.Random(method)
    asked = [filled(route.path, random_) + random_.choice(QUERIES) for route in ROUTES for _ in range(12)]
    answered(
        server,
        [(path, server.ask(method, path, token=random_.choice([None, READ, WRITE]))) for path in asked],
        250,
    )


@pytest.mark.parametrize("method", ["OPTIONS", "PATCH", "TRACE", "CONNECT", "BREW", "get", "X" * 200])
def test_methods_that_no_route_has(method: str, server: Server) -> None:
    asked = [
        *(sensible(route.path) for route in ROUTES),
        "/",
        "*",
        "//",
        "http://elsewhere/api/models",
        "/api/models/",
        "//evil/%2e%2e",
    ]
    answers = [(path, server.ask(method, path)) for path in asked]
    answered(server, answers, 25)
    assert {answer.status for _, answer in answers} <= {400, 404, 405}
    assert not any("location:" in answer.head.lower() for _, answer in answers)


@pytest.mark.parametrize(
    "route",
    [route for route in ROUTES if route.method in {"POST", "PUT"}],
    ids=lambda route: f"{route.method} {route.path}",
)
def test_bodies_that_are_none(route: object, server: Server) -> None:
    """Wrong types, too deep, cut, in another encoding: as whoever may write."""
    from adapterpack.hub.server.app import HubRoute

    assert isinstance(route, HubRoute)
    path = sensible(route.path).replace("/branch/main", "/branch/new")
    answered(server, [(repr(value[:80]), server.ask(route.method, path, value)) for value in VALUES], 60)


@pytest.mark.parametrize(
    "path",
    [
        "/api/models",
        "/api/models/org/open",
        "/api/models/org/open/tree/main?limit=1",
        "/org/open/resolve/main/a.json",
        "/api/models/org/open/paths-info/main",
        "/api/repos/create",
        "/org/open.git/info/lfs/objects/batch",
    ],
)
def test_headers_that_are_none(path: str, server: Server) -> None:
    """Hosts, ranges, lengths, encodings and upgrades that no client would send."""
    method = "POST" if path.endswith(("paths-info/main", "create", "batch")) else "GET"
    answered(
        server,
        [
            (
                header,
                server.ask(
                    method, path, token=None if "Authorization" in header else WRITE, headers=(header,)
                ),
            )
            for header in HEADERS
        ],
        45,
    )


def test_bytes_that_are_no_http(server: Server) -> None:
    random_ = random.Random(3)
    asked = [random_.randbytes(random_.randrange(1, 3000)) + b"\r\n\r\n" for _ in range(150)]
    asked += [
        b"\r\n" * 50 + b"GET / HTTP/1.1\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nA\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"GET /" + b"x" * MIB + b" HTTP/1.1\r\n\r\n",
        b"POST /api/repos/create HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET \xff HTTP/1.1\r\nHost: a\r\n\r\n",
    ]
    assert {server.raw(data).status for data in asked} <= {0, 400, 404, 401, 431}
    server.require_sound()


def test_requests_of_nobody_do_no_work(server: Server) -> None:
    """Every route that writes refuses before it reads: what its body would be does not matter, nor whether
    the repository is there.
    """
    for route in (route for route in ROUTES if route.writes):
        path, large = sensible(route.path), b"x" * (300 << 10)
        assert {server.ask(route.method, path, large, token=token).status for token in (None, READ)} <= {
            401,
            403,
        }
    server.require_sound()


@pytest.mark.parametrize("token", [None, "hf_" + "x" * 24], ids=["nobody", "wrong token"])
def test_what_is_private_is_answered_as_if_it_were_not_there(token: str | None, server: Server) -> None:
    """On every route, with every method: status, headers and body."""
    for route in (route for route in ROUTES if "{name}" in route.path):
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
            answers = set()
            for name in ("hidden", "absent"):
                answer = server.ask(
                    method,
                    sensible(route.path).replace("open", name),
                    b"{}" if method in {"POST", "PUT"} else b"",
                    token,
                )
                answers.add((answer.status, re.sub("(?m)^date: .*$", "", answer.head), answer.body))
            assert len(answers) == 1, answers
            assert min(answers)[0] in {401, 405, 404}


def test_an_address_for_uploads_that_was_made_up_or_altered(server: Server) -> None:
    sha256 = "ab" * 32
    value = {"operation": "upload", "objects": [{"oid": sha256, "size": 3}], "transfers": ["basic"]}
    [one] = json.loads(server.ask("POST", "/org/open.git/info/lfs/objects/batch", value).body)["objects"]
    address = one["actions"]["upload"]["href"].partition("/lfs/")[2]
    good = f"/lfs/{address}"
    altered = [
        good.replace("size=3", "size=4"),
        good.replace("until=", "until=1"),
        good.replace("signature=", "signature=0"),
        good.replace(sha256, "cd" * 32),
        good.replace(sha256, f"{sha256}/1"),
        good.replace(sha256, sha256.upper()),
        good + "&size=4",
        good.replace(sha256, "..%2f..%2fx"),
        good.replace("?", "?signature=0&"),
        good.replace("signature=", "Signature="),
    ]
    answers = [(path, server.ask("PUT", path, b"abc", token=None)) for path in altered]
    answered(server, answers, 10)
    assert {answer.status for _, answer in answers} <= {400, 403, 404}
    assert server.ask("PUT", good, b"xyz", token=None).status == 400, "other bytes than were announced"
    assert not [*(server.folder / "blobs").glob(f"*/{sha256}")]


@pytest.mark.parametrize(
    "range_",
    ["bytes=" + ",".join(f"{n}-" for n in range(500)), "bytes=0-,0-,0-", "bytes=" + ",".join(["0-9"] * 900)],
    ids=["many", "three times all", "one many times"],
)
def test_a_file_is_sent_once_however_many_ranges_are_wanted(range_: str, server: Server) -> None:
    assert (
        server.ask("POST", "/api/models/org/open/commit/main", commit(file("big.txt", b"x" * MIB))).status
        == 200
    )
    answer = server.ask("GET", "/org/open/resolve/main/big.txt", headers=(f"Range: {range_}",))
    assert answer.status in {200, 400, 416}
    assert len(answer.body) <= MIB


NAMES = [
    "con",
    "nul",
    "AUX",
    "com1",
    "lpt9.txt",
    "a.",
    "a ",
    "..",
    "a..b",
    "-a",
    "a" * 97,
    "a/b",
    "a\\b",
    "a:b",
    "\u202e",
    "",
    ".git",
    "x.git",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_file_systems_keep_for_themselves(name: str, server: Server) -> None:
    """Neither a repository, nor a branch, a tag or a user has one; nor a file, where it is a name of that
    kind.
    """
    before = sorted(path.name for path in (server.folder / "repos").glob("*/*"))
    refused = [
        server.ask("POST", "/api/repos/create", {"name": name, "organization": "org"}),
        server.ask("POST", "/api/repos/create", {"name": "fine", "organization": name})
        if name != "x.git"
        else None,
        server.ask("POST", "/api/models/org/open/tag/main", {"tag": name})
        if name not in {"a/b", "-a", "a" * 97, "x.git"}
        else None,
    ]
    if name not in {"a/b", "a..b", "-a", "a" * 97, ".git", "x.git"}:
        refused.append(server.ask("POST", "/api/models/org/open/commit/main", commit(file(name))))
    assert {answer.status for answer in refused if answer is not None} <= {400, 404}
    assert sorted(path.name for path in (server.folder / "repos").glob("*/*")) == before


@pytest.mark.parametrize(
    "paths", [["a", "A"], ["stra\u00dfe", "STRASSE"], ["d", "d/e"], ["D/x", "d"], ["d/e/f", "D/E"]], ids=str
)
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
    path = {
        "a list of lists": "/api/models/org/open/preupload/main",
        "a number without end": "/api/repos/create",
    }.get(kind, path)
    answered(server, [(kind, server.ask("POST", path, BODIES[kind]))], 1)
    assert time.monotonic() - started < 120
    assert server.memory() - before < 400 * MIB
