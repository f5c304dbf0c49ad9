"""What strangers send to a hub: nothing without a token is taken into memory, parsed for long or answered by
an error of the server.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import msgspec
import pytest
from hubs import READ, WRITE, Hub
from processes import child

from adapterpack.errors import StorageError
from adapterpack.http.http_error import HTTPError
from adapterpack.hub.server.parts import UploadedParts
from adapterpack.hub.server.storage import HubStorage
from adapterpack.hub.server.trees import MAX_FILES, Entry, Tree
from adapterpack.hub.server.writing import header_problem
from adapterpack.hub.transport import client
from adapterpack.io import strict_json

pytestmark = pytest.mark.fast

MIB = 1 << 20


class Reply:
    """Status, headers and body of one answer."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def code(self) -> str:
        """The name that clients know the error by."""
        return str(self.headers.get("X-Error-Code"))


def send(
    hub: Hub, method: str, path: str, body: Any = None, token: str | None = WRITE, **headers: str
) -> Reply:
    """One request on a connection of its own, its path as it is written here."""
    connection = http.client.HTTPConnection(urlsplit(hub.address).netloc, timeout=120)
    own = {"Authorization": f"Bearer {token}"} if token else {}
    data = json.dumps(body) if isinstance(body, dict) else body
    connection.request(method, path, data, {**own, **headers})
    reply = Reply(connection.getresponse())
    connection.close()
    return reply


def announced(
    hub: Hub, method: str, path: str, length: int | None, token: str | None, pieces: Iterable[bytes] = ()
) -> tuple[int, int]:
    """Announces a body of ``length`` bytes, or one in chunks, and sends its pieces until the hub answers; the
    status and the bytes sent.
    """
    there = urlsplit(hub.address)
    with socket.create_connection((str(there.hostname), int(there.port or 0)), timeout=120) as connection:
        size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        own = f"Authorization: Bearer {token}\r\n" if token else ""
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: hub\r\n{own}{size}\r\n\r\n".encode())
        sent, answer = 0, bytearray()

        def listen() -> None:
            while not answer.endswith(b"}") and (more := connection.recv(1 << 16)):
                answer.extend(more)

        listener = threading.Thread(target=listen)
        listener.start()
        for piece in pieces:
            if answer:
                break
            try:
                connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if length is None else piece)
            except OSError:  # hung up: it has said why before
                break
            sent += len(piece)
        listener.join(120)
    return int(answer.split()[1]), sent


def endless(piece: bytes, most: int = 64) -> Iterator[bytes]:
    for _ in range(most):
        yield piece
        time.sleep(0.005)


@pytest.fixture
def public(hub: Hub) -> str:
    client.api().create_repo("org/limits", exist_ok=True)
    return "/api/models/org/limits"


BODIES = {
    "paths": ("POST", "{repo}/paths-info/main", None),
    "yaml": ("POST", "/api/validate-yaml", WRITE),
    "create": ("POST", "/api/repos/create", WRITE),
    "settings": ("PUT", "{repo}/settings", WRITE),
    "grant": ("POST", "{repo}/user-access-request/grant", WRITE),
    "preupload": ("POST", "{repo}/preupload/main", WRITE),
    "tag": ("POST", "{repo}/tag/main", WRITE),
    "branch": ("POST", "{repo}/branch/new", WRITE),
    "large": ("POST", "/org/limits.git/info/lfs/objects/batch", WRITE),
    "commit": ("POST", "{repo}/commit/main", WRITE),
}
"""Every request with a body that is no file -> its method, its path, and whose token it needs."""


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_too_large_is_refused_before_it_is_read(name: str, hub: Hub, public: str) -> None:
    """By what it announces, before a byte of it is sent; and in chunks, without an announcement, soon after
    it is too much.
    """
    method, path, token = BODIES[name]
    assert announced(hub, method, path.format(repo=public), 700 * MIB, token) == (413, 0)
    if name != "commit":  # which may have 64 MiB
        status, sent = announced(hub, method, path.format(repo=public), None, token, endless(b"x" * MIB))
        assert status == 413
        assert sent < 24 * MIB, "what lies in the buffers of two sockets, beside the limit"


@pytest.mark.parametrize("name", sorted(BODIES.keys() - {"paths"}))
@pytest.mark.parametrize("token", [None, READ], ids=["nobody", "reader"])
def test_who_may_not_write_is_refused_before_a_body_is_read(
    name: str, token: str | None, hub: Hub, public: str
) -> None:
    method, path, _ = BODIES[name]
    assert announced(hub, method, path.format(repo=public), 100, token) == (403 if token else 401, 0)


def test_paths_are_looked_up_in_a_form_of_any_sensible_size(hub: Hub, public: str) -> None:
    """As the official client asks; and a form of very many fields is refused by name."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    asked = urlencode([("paths", f"file{number}") for number in range(2000)])
    assert json.loads(send(hub, "POST", f"{public}/paths-info/main", asked, None, **form).body) == []
    reply = send(hub, "POST", f"{public}/paths-info/main", "&".join(["a=b"] * 100_000), None, **form)
    assert (reply.status, reply.code) == (413, "TooLarge")


BOMB = "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" if n else "a0: &a0 [x]\n" for n in range(12)
)
MERGES = "".join(
    f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" if n else "a0: &a0 {x: 1}\n" for n in range(40)
)
YAML = {
    "deep flows": ("tags: " + "[" * 180_000, "flow level"),
    "flows": ("tags: " + "[" * 40 + "]" * 40, "nested"),
    "deep blocks": ("- " * 60_000 + "x", "nested"),
    "deep keys": ("? " * 60_000 + "x", "nested"),
    "a bomb of aliases": (BOMB, "aliases"),
    "a bomb of merges": (MERGES, "aliases"),
    "an alias of nothing": ("a: *b", "not YAML"),
    "too long": ("a: " + "x" * 300_000, "longer"),
    "a number of 5,000 digits": ("a: " + "9" * 5000, "not YAML"),
    "a tag that does not fit": ("a: !!timestamp yesterday", "not YAML"),
    "a boolean that is none": ("a: !!bool perhaps", "not YAML"),
    "a key that is a list": ("[a]: b", "not YAML"),
    "a Python object": ("a: !!python/object/apply:os.system [ls]", "not YAML"),
    "no mapping": ("- a", "no mapping"),
    "nothing": ("", "no mapping"),
    "an unfinished text": ('a: "x', "not YAML"),
}
"""The header of a README -> what is said of it."""


@pytest.mark.parametrize("name", YAML)
def test_a_header_that_is_none_is_named_soon(name: str, hub: Hub) -> None:
    """A 400 with a sentence, as the public hub answers, and no standstill."""
    text, said = YAML[name]
    started = time.monotonic()
    reply = send(hub, "POST", "/api/validate-yaml", {"content": f"---\n{text}\n---\n# Title\n"})
    assert time.monotonic() - started < 60
    assert reply.status == 400
    [error] = json.loads(reply.body)["errors"]
    assert said in error["message"]


@pytest.mark.parametrize(
    "text",
    [
        "license: mit",
        "a: &a [1]\nb: *a",
        "a: &a {x: 1}\nb: {<<: *a, y: 2}",
        "model-index: [{a: [{b: c}]}]",
        "tags:\n" + "- x\n" * 20_000,
        "a: 2020-01-01",
        "a: 2020-13-40",
    ],
)
def test_a_header_that_is_one_is_taken(text: str, hub: Hub) -> None:
    reply = send(hub, "POST", "/api/validate-yaml", {"content": f"---\n{text}\n---\n# Title\n"})
    assert (reply.status, json.loads(reply.body)) == (200, {"errors": [], "warnings": []})
    assert header_problem(text) is None


HELD = """
import sys
from adapterpack.hub.server import serve, writing
problem = writing.header_problem
def held(text):
    print("looking", flush=True)
    sys.stdin.readline()
    return problem(text)
writing.header_problem = held
serve.serve(sys.argv[1], port=0, tokens=sys.argv[2], ready=lambda address: print(address, flush=True))
"""


def test_others_are_answered_while_a_header_is_looked_at(tmp_path: Path) -> None:
    """It is parsed in a thread: a second request does not wait for the first, which this test holds there."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ann write {WRITE}\n")
    tokens.chmod(0o600)
    command = [sys.executable, "-c", HELD, str(tmp_path / "hub"), str(tokens)]
    with (
        child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
        ThreadPoolExecutor() as pool,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        hub = Hub(process.stdout.readline().strip(), tmp_path / "hub")
        first = pool.submit(send, hub, "POST", "/api/validate-yaml", {"content": "---\na: 1\n---\n"})
        try:
            assert process.stdout.readline() == "looking\n"
            assert send(hub, "GET", "/api/whoami-v2").status == 200
            assert not first.done()
        finally:
            process.stdin.write("\n")
            process.stdin.flush()
        assert first.result().status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/api/models/org/limits/revision/a%0d%0aX-Injected%3a%20yes",
        "/api/models/org/limits/tree/main/a%0db",
        "/org/limits/resolve/main/a%0ab",
        "/org/limits/resolve/a%00b/c",
        "/api/models/org/li%1bmits",
        "/api/models/org/limits/tree/%7f",
        "/api/models/org/limits/tree/main?cursor=1%0d%0aX-Injected:%20yes",
    ],
)
def test_no_control_character_comes_back_in_a_header(path: str, hub: Hub, public: str) -> None:
    """Refused by name where it stands in the address."""
    reply = send(hub, "GET", path)
    assert reply.status == 400
    assert reply.code == "BadRequest"
    assert reply.headers.get("X-Injected") is None
    assert not any(ord(c) < 32 or ord(c) == 127 for value in reply.headers.values() for c in value)


@pytest.mark.parametrize("value", ["\r\nX-Injected: yes", "\x00", " x ", "é\x1b[2J", "\u202e", "\ud800"])
def test_no_control_character_of_a_body_comes_back_in_a_header(value: str, hub: Hub, public: str) -> None:
    """Whatever field of whatever request it stands in: an answer arrives, and what it repeats is plain."""
    commit = "\n".join(
        map(
            json.dumps,
            [{"key": "header", "value": {"summary": value}}, {"key": "file", "value": {"path": value}}],
        )
    )
    for reply in (
        send(hub, "POST", f"{public}/commit/main", commit),
        send(hub, "POST", f"{public}/tag/main", {"tag": value}),
        send(hub, "POST", "/api/repos/create", {"name": value}),
        send(hub, "PUT", f"{public}/settings", {"gated": value}),
        send(hub, "POST", f"{public}/branch/new", {"startingPoint": value}),
        send(hub, "POST", "/org/limits.git/info/lfs/objects/batch", {"objects": [{"oid": value, "size": 1}]}),
        send(hub, "POST", f"{public}/preupload/main", {"files": [{"path": value, "size": 1}]}),
    ):
        assert 400 <= reply.status < 500
        assert reply.headers.get("X-Injected") is None
        assert all(31 < ord(c) < 127 for value in reply.headers.values() for c in value)


ADDRESSES = {
    "digits": f"size={'9' * 5000}&until={'9' * 5000}&signature=0",
    "other digits": "size=%D9%A1&until=%D9%A1&signature=0",
    "other letters": "size=1&until=9999999999&signature=%C3%A9",
    "nothing": "",
    "half a character": "size=1&until=1&signature=%ff%fe",
    "control characters": "size=1&until=9999999999&signature=%0d%0a",
}


@pytest.mark.parametrize("kind", ADDRESSES)
@pytest.mark.parametrize(
    "place",
    [
        "PUT /lfs/" + "0" * 64,
        "PUT /lfs/" + "0" * 64 + "/1",
        "POST /lfs/" + "0" * 64,
        "PUT /lfs/%E9%ff",
        "PUT /lfs/" + "0" * 64 + "/" + "9" * 5000,
        "PUT /lfs/..%2f..%2fx",
        "PUT /lfs/" + "0" * 64 + "/x",
    ],
)
def test_an_address_that_was_never_given_out_is_refused(place: str, kind: str, hub: Hub) -> None:
    """Made up, it is a 403 (or no address at all), and never an error of the server."""
    method, _, path = place.partition(" ")
    assert send(hub, method, f"{path}?{ADDRESSES[kind]}", b"x", None).status in {400, 403, 404}


def test_strangers_cannot_tell_a_private_repository_from_none(hub: Hub, public: str) -> None:
    """Byte by byte the same answer, on every route that names a repository; who has a token is told the
    truth.
    """
    client.api().create_repo("org/hidden", private=True, exist_ok=True)
    routes = [
        "GET /api/models/{}",
        "GET /api/models/{}/revision/main",
        "GET /api/models/{}/tree/main",
        "GET /api/models/{}/refs",
        "GET /{}/resolve/main/README.md",
        "HEAD /{}/resolve/main/x",
        "POST /api/models/{}/paths-info/main",
        "POST /api/models/{}/commit/main",
        "POST /api/models/{}/tag/main",
        "PUT /api/models/{}/settings",
        "POST /{}/info/lfs/objects/batch",
    ]
    for route in routes:
        method, _, path = route.partition(" ")
        replies = [
            send(hub, method, path.format(repo), token=None)
            for repo in ("org/hidden", "org/nowhere", "..%2fx/y", "org/hidden.git")
        ]
        assert {(reply.status, reply.code, reply.body) for reply in replies} == {
            (401, "RepoNotFound", replies[0].body)
        }
    assert send(hub, "GET", "/api/models/org/hidden", token=READ).status == 200
    assert send(hub, "GET", "/api/models/org/nowhere", token=READ).status == 404
    assert send(hub, "GET", "/api/models/org/limits", token=None).status == 200


@pytest.mark.parametrize("name", ["con", "nul", "AUX", "com1", "con.txt", "lpt9.x"])
def test_a_name_that_is_a_device_elsewhere_is_given_to_nothing(name: str, hub: Hub, public: str) -> None:
    """A folder of that name could not be copied to every system."""
    for value in ({"name": name, "organization": "org"}, {"name": "fine", "organization": name}):
        assert send(hub, "POST", "/api/repos/create", value).status == 400
    assert send(hub, "POST", f"{public}/tag/main", {"tag": name}).status == 400
    assert send(hub, "POST", f"{public}/branch/{name}", {}).status == 400
    assert send(hub, "POST", f"{public}/branch/{quote(f'a/{name}', safe='')}", {}).status == 400


@pytest.mark.parametrize(
    "value", [{"name": None}, {"name": 7}, {"name": ["x"]}, {"name": "x", "organization": {}}, {}]
)
def test_a_repository_is_named_by_text(value: dict[str, Any], hub: Hub) -> None:
    assert send(hub, "POST", "/api/repos/create", value).status == 400


def test_a_revision_of_any_length_is_answered(hub: Hub, public: str) -> None:
    """Longer than the name of a file may be, it is no revision."""
    long = quote("/".join(["x" * 100] * 5), safe="")
    assert send(hub, "GET", f"{public}/revision/{long}").status == 404
    assert send(hub, "POST", f"{public}/branch/{long}", {}).status == 400


def test_a_repository_has_no_more_files_than_its_limit(tmp_path: Path) -> None:
    """One of that size is answered soon, and its pages are written anew only where something changes."""
    storage = HubStorage(tmp_path)
    storage.create("org/name", private=False, author="me")
    entry = storage.keep_bytes(b"")

    def change(count: int) -> Callable[[dict[str, Any]], None]:
        return lambda files: files.update({f"f{number}": entry for number in range(count)})

    with pytest.raises(HTTPError, match="files") as caught:
        storage.change(
            "org/name", "main", "me", "", "", parent=None, change=change(MAX_FILES + 1), as_pr=False
        )
    assert caught.value.status == 413
    oid, _ = storage.change(
        "org/name", "main", "me", "", "", parent=None, change=change(MAX_FILES), as_pr=False
    )
    started = time.process_time()
    assert len(storage.commit("org/name", oid).files) == MAX_FILES
    assert storage.commit("org/name", oid).files["f777"] == entry
    assert time.process_time() - started < 0.5
    blobs, other = {*tmp_path.glob("blobs/*/*")}, storage.keep_bytes(b"other")
    change_one = {"f777": other}
    storage.change(
        "org/name",
        "main",
        "me",
        "",
        "",
        parent=None,
        change=lambda files: files.update(change_one),
        as_pr=False,
    )
    assert len({*tmp_path.glob("blobs/*/*")} - blobs) == 2, "the file, and its page"


def lines(*operations: dict[str, Any]) -> str:
    """The body of a commit."""
    return "\n".join(json.dumps(line) for line in ({"key": "header", "value": {"summary": "x"}}, *operations))


def removal(path: Any, kind: str = "deletedFile") -> dict[str, Any]:
    return {"key": kind, "value": {"path": path}}


def test_a_commit_of_very_many_removals_costs_no_more_than_its_lines_and_the_files(
    hub: Hub, public: str
) -> None:
    """20,000 of each, nested ones too: the answer comes before the client hangs up. What is named by no line
    stays.
    """
    storage = HubStorage(hub.folder)
    entry = storage.keep_bytes(b"")
    files = {f"a/{number % 7}/f{number}": entry for number in range(20_000)}
    storage.change(
        "org/limits", "main", "me", "", "", parent=None, change=lambda there: there.update(files), as_pr=False
    )
    reply = send(hub, "POST", f"{public}/commit/main", lines(*map(removal, [*files][1:]), removal("a/1")))
    assert reply.status == 200, reply.body
    left = storage.commit("org/limits", storage.resolve("org/limits", "main")).files
    assert [path for path in left if path.startswith("a/")] == ["a/0/f0"]


@pytest.mark.parametrize("seed", range(8))
def test_a_commit_is_its_operations_one_after_the_other(seed: int) -> None:
    """Against the plain loop, with files that come, go, and come again as folders."""
    from adapterpack.hub.server.trees import change

    dice = random.Random(seed)
    paths = ["a", "a/b", "a/b/c", "a/b/d", "a-b", "a0", "a/bc", "b", "b/c", ""]
    entries = [Entry(number, "", "", False) for number in range(99)]
    files = {path: dice.choice(entries) for path in dice.sample(paths[:-1], 5)}
    steps = [
        (dice.choice(paths), None if dice.random() < 0.6 else dice.choice(entries))
        for _ in range(dice.randrange(30))
    ]
    wanted = dict(files)
    for path, entry in steps:
        if entry is not None:
            wanted[path] = entry
        else:
            wanted = {
                name: one for name, one in wanted.items() if name != path and not name.startswith(f"{path}/")
            }
    change(files, steps)
    assert files == wanted


@pytest.mark.parametrize(
    "operation",
    [
        {"key": "file", "value": {"path": ["x"], "content": ""}},
        {"key": "file", "value": {"content": ""}},
        removal(["x"]),
        removal(7),
        removal({}, "deletedFolder"),
    ],
    ids=["list", "none", "removed-list", "removed-number", "removed-object"],
)
def test_a_path_is_text(operation: dict[str, Any], hub: Hub, public: str) -> None:
    reply = send(hub, "POST", f"{public}/commit/main", lines(operation))
    assert reply.status == 400
    assert "path" in reply.headers["X-Error-Message"]


def test_what_is_removed_while_it_is_asked_for_is_not_there(hub: Hub, public: str) -> None:
    """A reference that a listing names and a commit that a branch names, both gone when they are read."""
    refs = hub.folder / "repos" / "org" / "limits" / "refs"
    send(hub, "POST", f"{public}/tag/main", {"tag": "kept"})
    gone = refs / "tags" / "gone"
    gone.symlink_to(refs / "nothing")
    (refs / "heads" / "bare").write_text("0" * 40)
    try:
        reply = send(hub, "GET", f"{public}/refs")
        assert (reply.status, [one["name"] for one in json.loads(reply.body)["tags"]]) == (200, ["kept"])
        assert send(hub, "GET", f"{public}/revision/bare").status == 404
        assert send(hub, "POST", f"{public}/commit/bare", lines()).status == 404
    finally:
        gone.unlink()
        (refs / "heads" / "bare").unlink()


def test_commits_as_hubs_wrote_them_before_are_read(tmp_path: Path) -> None:
    """With their files in them; the next commit has pages."""
    storage = HubStorage(tmp_path)
    storage.create("org/name", private=False, author="me")
    entry, folder = storage.keep_bytes(b"x"), tmp_path / "repos" / "org" / "name"
    files = {"a.json": msgspec.structs.asdict(entry)}
    value = {
        "parent": None,
        "summary": "s",
        "description": "",
        "author": "me",
        "time": "2026-01-01T00:00:00.000Z",
        "files": files,
    }
    data = strict_json.canonical(value)
    oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    (folder / "commits" / f"{oid}.json").write_bytes(data)
    (folder / "refs" / "heads" / "main").write_text(oid)
    assert dict(storage.commit("org/name", storage.resolve("org/name", "main")).files) == {"a.json": entry}
    more = {"b/c.json": entry}
    oid, _ = storage.change(
        "org/name", "main", "me", "", "", parent=oid, change=lambda files: files.update(more), as_pr=False
    )
    assert [*storage.commit("org/name", oid).files] == ["a.json", "b/c.json"]


PATHS = ["a", "a-b", "b/c", "b/d/e", "b/d/f", "b0", "c/x/y/z", "d"]
RECURSIVE = ["a", "a-b", "b/", "b/c", "b/d/", "b/d/e", "b/d/f", "b0", "c/", "c/x/", "c/x/y/", "c/x/y/z", "d"]


@pytest.mark.parametrize(
    ("folder", "recursive", "listed"),
    [
        ("", True, RECURSIVE),
        ("", False, ["a", "a-b", "b/", "b0", "c/", "d"]),
        ("b", True, ["b/c", "b/d/", "b/d/e", "b/d/f"]),
        ("b", False, ["b/c", "b/d/"]),
        ("b/d", False, ["b/d/e", "b/d/f"]),
        ("c", False, ["c/x/"]),
        ("a", True, []),
        ("x", False, []),
        ("c/x/y", True, ["c/x/y/z"]),
    ],
)
def test_a_listing_goes_on_where_its_last_page_ended(folder: str, recursive: bool, listed: list[str]) -> None:
    """Each file and each folder once, folders before what lies in them, wherever a page ends."""
    tree = Tree.of({path: Entry(1, "0" * 64, "0" * 40, False) for path in PATHS})
    assert [path for path, _ in tree.below(folder, recursive)] == listed
    for size in (1, 2, 3):
        paged, after = list[str](), ""
        while page := [path for path, _ in islice(tree.below(folder, recursive, after), size)]:
            paged += page
            after = page[-1]
        assert paged == listed


def test_the_official_client_follows_the_pages(hub: Hub) -> None:
    storage, api = HubStorage(hub.folder), client.api()
    api.create_repo("org/paged", exist_ok=True)
    entry = storage.keep_bytes(b"x")
    paths = [f"d{number // 400}/é {number:04}.json" for number in range(2500)]
    more = dict.fromkeys(paths, entry)
    storage.change(
        "org/paged", "main", "me", "", "", parent=None, change=lambda files: files.update(more), as_pr=False
    )
    listed = [one.path for one in api.list_repo_tree("org/paged", recursive=True)]
    assert sorted(listed) == sorted([*paths, *(f"d{number}" for number in range(7))])
    assert len(listed) == 2507
    assert sorted(api.list_repo_files("org/paged")) == sorted(paths)
    assert len([*api.list_repo_tree("org/paged", "d1")]) == 400
    assert sorted(client.tree(client.connect(client.names.parse("org/paged/d6")))) == [
        path[3:] for path in paths[2400:]
    ]
    assert "org/paged" in [one.id for one in api.list_models(author="org")]


def test_an_altered_commit_is_not_served(tmp_path: Path) -> None:
    """Its bytes have its id, or it is none."""
    storage = HubStorage(tmp_path)
    storage.create("org/name", private=False, author="me")
    oid = storage.resolve("org/name", "main")
    file = tmp_path / "repos" / "org" / "name" / "commits" / f"{oid}.json"
    file.write_bytes(file.read_bytes().replace(b"initial", b"altered"))
    with pytest.raises(StorageError, match="altered on the hub's disk"):
        storage.commit("org/name", oid)


IMPATIENT = """
import resource, sys
from adapterpack.hub.server import serve
from adapterpack.http import bodies, protocol
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
protocol.HEAD_SECONDS = bodies.PAUSE_SECONDS = 0.1
serve.serve(sys.argv[1], port=0, ready=lambda address: print(address, flush=True))
"""
HALVES = {
    "nothing": b"",
    "half a head": b"GET /api/models HTTP/1.1\r\nHost: hub\r\nX-A: ",
    "half a second head": b"GET /api/whoami-v2 HTTP/1.1\r\nHost: hub\r\n\r\nGET /api/",
    "half a body": (
        b"POST /api/models/org/name/paths-info/main HTTP/1.1\r\nHost: hub\r\nContent-Length: 1000\r\n\r\nabc"
    ),
}


def test_connections_on_which_nothing_goes_on_do_not_stop_the_hub(tmp_path: Path) -> None:
    """More of them than the process may have open files: they are closed in time, and others are answered."""
    storage = HubStorage(tmp_path)
    storage.create("org/name", private=False, author="me")
    command = [sys.executable, "-c", IMPATIENT, str(tmp_path)]
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        hub = Hub(process.stdout.readline().strip(), tmp_path)
        there = urlsplit(hub.address)
        with ExitStack() as opened:
            for start in [*HALVES.values()] * 18:
                connection = opened.enter_context(
                    socket.create_connection((str(there.hostname), int(there.port or 0)), timeout=120)
                )
                with contextlib.suppress(ConnectionError):  # it may have been closed before
                    connection.sendall(start)
            status, until = 0, time.monotonic() + 120
            while status != 200 and time.monotonic() < until:
                # A busy machine may take longer than this hub waits for a head.
                with contextlib.suppress(OSError, http.client.HTTPException):
                    status = send(hub, "GET", "/api/models", token=None).status
            assert status == 200


def test_a_connection_that_is_used_is_kept(tmp_path: Path) -> None:
    """Short requests, one after the other, for three times as long as the hub waits for a head: the
    connection never ends between them, unless this process itself was kept from sending for that long.
    """
    program = IMPATIENT.replace("bodies.PAUSE_SECONDS = 0.1", "1.0")
    with child(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        address, pauses = urlsplit(process.stdout.readline().strip()).netloc, list[float]()
        while len(pauses) < 30:
            connection = http.client.HTTPConnection(address, timeout=120)
            connection.connect()
            connection.auto_open = 0  # it does not begin another one by itself
            answered, pauses = time.monotonic(), []
            with contextlib.closing(connection):
                try:
                    while len(pauses) < 30:
                        time.sleep(0.1)
                        connection.request("GET", "/api/models")
                        pauses.append(time.monotonic() - answered)
                        assert connection.getresponse().read() == b"[]"
                        answered = time.monotonic()
                except (http.client.HTTPException, OSError):
                    assert max([*pauses, time.monotonic() - answered]) > 0.9
                    pauses = []


def test_leftovers_are_removed_from_the_hubs_own_folders_only(tmp_path: Path) -> None:
    """Parts of uploads that nobody finished go after a day: never through a link."""
    storage, old = HubStorage(tmp_path / "hub"), tmp_path / "mine" / "thesis"
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    (tmp_path / "hub" / "tmp" / "parts").symlink_to(tmp_path / "mine")
    with pytest.raises(StorageError, match="is a link"):
        UploadedParts(storage)
    assert old.is_dir()
