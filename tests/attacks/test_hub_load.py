"""Attacks on a hub: clients that keep it waiting, and repositories of very many files."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
from attacked_hub import MIB, Server, commit, file

from adapterpack.hub.server.collecting import KEPT_SECONDS, Collector
from adapterpack.hub.server.parts import UploadedParts
from adapterpack.hub.server.storage import HubStorage
from adapterpack.hub.server.trees import Entry

# --- clients that keep it waiting ---------------------------------------------------------------------------


def half(number: int) -> bytes:
    """The beginning of a request that does not go on."""
    kinds = [
        b"",
        b"G",
        b"GET /api/models HTTP/1.1\r\nHost: hub\r\nX-A: ",
        b"GET /api/whoami-v2 HTTP/1.1\r\nHost: hub\r\n\r\nGET /api/",
        b"POST /api/models/org/open/paths-info/main HTTP/1.1\r\nHost: hub\r\nContent-Length: 1000\r\n\r\nabc",
        b"GET /org/open/resolve/main/large.txt HTTP/1.1\r\nHost: hub\r\n\r\n" * 4,
    ]
    return kinds[number % len(kinds)]


@pytest.fixture(scope="module")
def large(server: Server) -> str:
    """A file that does not fit into the buffers of a socket."""
    assert (
        server.ask(
            "POST", "/api/models/org/open/commit/main", commit(file("large.txt", b"x" * (9 * MIB)))
        ).status
        == 200
    )
    return "large.txt"


@pytest.mark.parametrize("count", [300, 700])
def test_connections_on_which_nothing_goes_on(count: int, server: Server, large: str) -> None:
    """More than it may have: others are answered at once, and its files are not used up."""
    with ExitStack() as stack:
        for number in range(count):
            connection = stack.enter_context(socket.create_connection(server.address, timeout=120))
            with suppress(OSError):  # room was made
                connection.sendall(half(number))
            if number % 50 == 49:
                started = time.monotonic()
                assert server.ask("GET", "/api/models/org/open/tree/main").status == 200
                assert time.monotonic() - started < 60
        # a file goes once its task has heard that its connection is gone
        until = time.monotonic() + 120
        while (files := server.files()) >= 800:
            assert files < 1024
            assert time.monotonic() < until
            time.sleep(0.02)
    server.require_sound()


def seconds_until_closed(server: Server, start: bytes, drip: bytes = b"") -> float:
    """How long the hub lets a client of that kind wait; the client sends a little more now and then, and
    reads nothing until the end.
    """
    with socket.create_connection(server.address, timeout=120) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(start)
        started = time.monotonic()
        while time.monotonic() - started < 120:
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
    "a body that trickles": (
        b"POST /api/models/org/open/paths-info/main HTTP/1.1\r\nHost: hub\r\nContent-Length: 90000\r\n\r\n",
        b"a",
    ),
    "chunks that trickle": (
        b"POST /api/models/org/open/paths-info/main HTTP/1.1\r\nHost: hub\r\nTransfer-Encoding: "
        b"chunked\r\n\r\n",
        b"1\r\na\r\n",
    ),
    "an answer that nobody reads": (
        b"GET /org/open/resolve/main/large.txt HTTP/1.1\r\nHost: hub\r\n\r\n",
        b"",
    ),
}


@pytest.mark.parametrize("kind", WAITING)
def test_a_client_that_keeps_the_hub_waiting_is_sent_away(kind: str, server: Server, large: str) -> None:
    before = server.files()
    if kind == "an answer that nobody reads":
        with socket.create_connection(server.address, timeout=120) as connection:
            connection.sendall(WAITING[kind][0])
            assert connection.recv(1, socket.MSG_PEEK)  # the answer has begun
            until = time.monotonic() + 120
            while server.files() > before and time.monotonic() < until:
                time.sleep(0.1)
            assert server.files() <= before
            with suppress(ConnectionError):
                assert sum(map(len, iter(partial(connection.recv, MIB), b""))) < 9 * MIB
    else:
        assert seconds_until_closed(server, *WAITING[kind]) < 100
    server.require_sound()


# --- many files ---------------------------------------------------------------------------------------------

MANY = 100_000


def update(more: dict[str, Entry], files: dict[str, Entry]) -> None:
    files.update(more)


@pytest.fixture(scope="module")
def many(server: Server) -> str:
    """A repository of as many files as one may have, from five commits, made by another process that serves
    the same folder.
    """
    server.ask("POST", "/api/repos/create", {"name": "many", "organization": "org"})
    storage = HubStorage(server.folder)
    entry = storage.keep_bytes(b"x")
    for start in range(0, MANY, 20_000):
        more = {f"d{number // 500:03}/f{number:06}.json": entry for number in range(start, start + 20_000)}
        storage.change(
            "org/many", "main", "ann", "", "", parent=None, change=partial(update, more), as_pr=False
        )
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
    assert time.monotonic() - started < 60
    assert server.memory() - before < 32 * MIB
    assert {answer.status for answer in answers} == {404 if kind == "no file" else 200}
    assert len(answers[0].body) < 512 << 10


def test_a_repository_has_no_more_files_than_that(server: Server, many: str) -> None:
    answer = server.ask("POST", f"{many}/commit/main", commit(file("one more")))
    assert (answer.status, answer.code) == (413, "TooLarge")


def test_what_nobody_finished_or_named_goes_and_nothing_else(tmp_path: Path) -> None:
    """Parts, files that were arriving, blobs of refused commits: after a day; what a commit of any time names
    stays.
    """
    storage = HubStorage(tmp_path)
    storage.create("org/name", private=False, author="ann")
    kept, orphan, taken = (storage.keep_bytes(text) for text in (b"kept", b"orphan", b"taken again"))
    first = storage.change(
        "org/name", "main", "ann", "", "", parent=None, change=lambda files: files.update(a=kept), as_pr=False
    )[0]
    storage.change(
        "org/name", "main", "ann", "", "", parent=None, change=lambda files: files.clear(), as_pr=False
    )
    parts = UploadedParts(storage)
    (tmp_path / "tmp" / "parts" / ("0" * 64)).mkdir()
    (tmp_path / "tmp" / "left").write_bytes(b"x")
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    assert storage.renew(taken.sha256)
    (tmp_path / "tmp" / "arriving").write_bytes(b"x")
    assert Collector(storage, parts).collect() == 1
    assert not storage.blob(orphan.sha256).exists()
    assert storage.blob(taken.sha256).read_bytes() == b"taken again"
    assert storage.blob(storage.commit("org/name", first).files["a"].sha256).read_bytes() == b"kept"
    assert sorted(path.name for path in (tmp_path / "tmp").iterdir()) == ["arriving", "parts"]
    assert not [*(tmp_path / "tmp" / "parts").iterdir()]
    assert KEPT_SECONDS == 86_400
