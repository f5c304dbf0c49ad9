"""Attacks by a hub on its clients: answers without end, slow ones, and bytes that are not those that it
lists.
"""

from __future__ import annotations

import gzip
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial

import pytest
from attack import Attacks
from attacking_hub import COMMIT, MIB, PACK, Host, Request, entry, impatient, pull

# --- size and time ------------------------------------------------------------------------------------------


def trickles(request: Request) -> None:
    request.begin(Content_Length="100000", X_Repo_Commit=COMMIT)
    for _ in range(4000):
        request.wfile.write(b" ")
        time.sleep(0.05)


def trickles_its_head(request: Request) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(4000):
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
    kinds = {
        "gzip": gzip.compress,
        "deflate": zlib.compress,
        "gzip, gzip": lambda data: gzip.compress(gzip.compress(data)),
    }
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
        entries = {
            "empty": [],
            "folders": [{"type": "directory", "path": "a", "oid": "0" * 40, "size": 0}] * 1000,
            "one file": [entry(f"f{number}.json")] * 1,
            "the same": [entry("a.json")],
            "files": [entry(f"f{number}-{n}.json") for n in range(1000)],
            "cookies": [entry(f"f{number}.json")],
        }[kind]
        cookies = {"Set_Cookie": f"c{number}={'x' * 60_000}"} if kind == "cookies" else {}
        request.say(entries, Link=f'<{request.path}&n={number}>; rel="next"', **cookies)

    return page


@pytest.mark.parametrize("kind", ["empty", "folders", "files", "the same", "cookies"])
def test_a_listing_without_end(kind: str, hub: Host, attacks: Attacks) -> None:
    hub.answers["/tree/"] = pages(kind)
    pull(attacks, hub).refused(absent=attacks.work / "out")


# --- bytes --------------------------------------------------------------------------------------------------


def base_of(address: str) -> int:
    """A base of that hub, which the official client fetches."""
    from adapterpack.hub.resolve import folder_of

    with suppress(SystemExit):
        impatient(address, "--version")
    folder_of("hf://org/name")
    return 0


OUT = "../../../../outside/planted"
HEADERS = {
    "an etag": {"ETag": f'"{OUT}"'},
    "a linked etag": {"ETag": '"a"', "X_Linked_Etag": f'"{OUT}"', "X_Linked_Size": "2"},
    "an etag of root": {"ETag": '"/nowhere/planted"'},
    "a commit": {"ETag": '"a"', "X_Repo_Commit": OUT},
    "a long etag": {"ETag": '"' + "x" * 5000 + '"'},
    "dots": {"ETag": '".."'},
    "a control character": {"ETag": '"a\x1b[2J"'},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_no_header_becomes_a_path(kind: str, hub: Host, attacks: Attacks) -> None:
    """The official client names what it keeps by headers."""
    hub.answers = {
        "/revision/": lambda request: request.say(
            {"sha": COMMIT, "id": "org/name", "siblings": [{"rfilename": "config.json"}]}
        ),
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
            request.say(
                data=PACK[1:], status=206, Content_Range=f"bytes 1-{len(PACK) - 1}/{len(PACK)}", **head
            )
        elif kind == "an empty part":
            request.say(data=b"", status=206, Content_Range="bytes */0", **head)
        elif kind == "nothing and no content":
            request.begin(204, **head)
        else:  # it stalls at the last byte
            request.begin(Content_Length=str(len(PACK)), **head)
            request.wfile.write(PACK[:-1])
            time.sleep(60)

    return resolve


@pytest.mark.parametrize(
    "kind",
    [
        "other bytes",
        "fewer",
        "more",
        "more, without a length",
        "another commit",
        "a part",
        "an empty part",
        "nothing and no content",
        "the last byte never comes",
    ],
)
def test_bytes_that_were_not_listed(kind: str, hub: Host, attacks: Attacks) -> None:
    hub.answers["/resolve/"] = changing(kind)
    pull(attacks, hub).refused(absent=attacks.work / "out")
    assert not [*attacks.work.rglob("adapterpack.json")]
