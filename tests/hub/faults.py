"""The product's hub with a layer before it that misbehaves on demand: run as a process of its own, told what
to do over HTTP.

python tests/hub/faults.py FOLDER TOKENS          prints its address
POST /_faults {"name": "bit flip", "times": 1}     arms one fault; an empty object disarms; answers what was
met and sent since the last
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from adapterpack.http.port import listening
from adapterpack.hub.server.access import Access
from adapterpack.hub.server.app import build

TENSORS = r"GET .*/resolve/.*\.safetensors$"
MANIFEST = r"GET .*/resolve/.*/adapterpack\.json$"
TREE = r"GET .*/tree/[^/]+$"
INFO = r"GET /api/models/[^/]+/[^/]+(/revision/.*)?$"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


Run = Callable[[Any, Any, Any, Any], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """What it does to the requests that ``matches`` (METHOD and path)."""

    matches: str
    run: Run


async def collected(app: Any, scope: Any, receive: Any) -> Reply:
    """The whole reply of the real hub."""
    reply = Reply(0, {}, b"")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {key.decode().lower(): value.decode() for key, value in message["headers"]}
        elif message["type"] == "http.response.body":
            reply.body += message.get("body", b"")

    await app({**scope, "extensions": {}}, receive, send)
    return reply


async def sent(reply: Reply, send: Any, length: int | None = None) -> None:
    headers = {**reply.headers, "content-length": str(len(reply.body) if length is None else length)}
    await send(
        {
            "type": "http.response.start",
            "status": reply.status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": reply.body})


def edits(change: Callable[[Reply], None]) -> Run:
    async def run(app: Any, scope: Any, receive: Any, send: Any) -> None:
        reply = await collected(app, scope, receive)
        change(reply)
        await sent(reply, send)

    return run


def lists(change: Callable[[list[dict[str, Any]]], None]) -> Run:
    """Edits the tree."""

    def edit(reply: Reply) -> None:
        entries = json.loads(reply.body)
        change(entries)
        reply.body = json.dumps(entries).encode()

    return edits(edit)


def tells(change: Callable[[dict[str, Any]], object]) -> Run:
    """Edits what the hub says of the repository."""

    def edit(reply: Reply) -> None:
        value = json.loads(reply.body)
        change(value)
        reply.body = json.dumps(value).encode()

    return edits(edit)


def answers(status: int, headers: dict[str, str] | None = None, body: bytes = b"{}") -> Run:
    async def run(app: Any, scope: Any, receive: Any, send: Any) -> None:
        await sent(Reply(status, {"content-type": "application/json", **(headers or {})}, body), send)

    return run


def adds(path: str) -> Run:
    return lists(
        lambda entries: entries.append({"type": "file", "path": path, "size": 2, "oid": "9e26dfeeb6" * 4})
    )


def _large(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return next(entry for entry in entries if "lfs" in entry)


def _flip(reply: Reply) -> None:
    reply.body = reply.body[:-1] + bytes([reply.body[-1] ^ 1])


def _shorten(reply: Reply) -> None:
    reply.body = reply.body[:-7]


def _lengthen(reply: Reply) -> None:
    reply.body += b"more"


def _all_of_it(reply: Reply) -> None:
    reply.status = 200
    reply.headers.pop("content-range", None)


def _drop_large(entries: list[dict[str, Any]]) -> None:
    entries.remove(_large(entries))


def _other_size(entries: list[dict[str, Any]]) -> None:
    found = _large(entries)
    found["size"] += 1
    found["lfs"]["size"] += 1


def _other_digest(entries: list[dict[str, Any]]) -> None:
    _large(entries)["lfs"]["oid"] = "0" * 64


def _no_digest(entries: list[dict[str, Any]]) -> None:
    _large(entries)["lfs"]["oid"] = "none"


async def _cut(app: Any, scope: Any, receive: Any, send: Any) -> None:
    reply = await collected(app, scope, receive)
    length, reply.body = len(reply.body), reply.body[: len(reply.body) // 2]
    await sent(reply, send, length)


async def _stall(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Half of a body, and then nothing for longer than a test waits: time to kill the client."""
    reply = await collected(app, scope, receive)
    headers = {**reply.headers, "content-length": str(len(reply.body))}
    await send(
        {
            "type": "http.response.start",
            "status": reply.status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": reply.body[: len(reply.body) // 2], "more_body": True})
    await asyncio.sleep(600.0)


async def _hang(app: Any, scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(600.0)


async def _crawl(app: Any, scope: Any, receive: Any, send: Any) -> None:
    reply = await collected(app, scope, receive)
    headers = {**reply.headers, "content-length": str(len(reply.body))}
    await send(
        {
            "type": "http.response.start",
            "status": reply.status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": reply.body[:3], "more_body": True})
    await asyncio.sleep(60.0)
    await send({"type": "http.response.body", "body": reply.body[3:]})


async def _trickle(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """A byte now and then: no pause is long, and there is no end."""
    reply = await collected(app, scope, receive)
    headers = {**reply.headers, "content-length": str(len(reply.body))}
    await send(
        {
            "type": "http.response.start",
            "status": reply.status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
    )
    for at in range(len(reply.body)):
        await send({"type": "http.response.body", "body": reply.body[at : at + 1], "more_body": True})
        await asyncio.sleep(0.05)


async def _endless(app: Any, scope: Any, receive: Any, send: Any) -> None:
    page = [{"type": "file", "path": f"f{number}.json", "size": 2, "oid": "0" * 40} for number in range(5000)]
    port = scope["server"][1]
    link = f'<http://127.0.0.1:{port}{scope["path"]}?recursive=true>; rel="next"'
    await sent(
        Reply(200, {"content-type": "application/json", "link": link}, json.dumps(page).encode()), send
    )


def _redirects(where: Callable[[Any], str]) -> Run:
    async def run(app: Any, scope: Any, receive: Any, send: Any) -> None:
        reply = await collected(app, scope, receive)
        await sent(Reply(302, {**reply.headers, "location": where(scope)}, b""), send)

    return run


async def _overtake(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Somebody else's commit, a moment before this one."""
    lines = [
        {"key": "header", "value": {"summary": "overtaking", "description": ""}},
        {"key": "file", "value": {"path": "README.md", "content": "aGVsbG8=", "encoding": "base64"}},
    ]
    body, given = "\n".join(map(json.dumps, lines)).encode(), []

    async def other() -> Any:
        given.append(True)
        return {"type": "http.request", "body": body if len(given) == 1 else b"", "more_body": False}

    assert (await collected(app, scope, other)).status == 200
    await app(scope, receive, send)


async def _break_off(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """The hub takes the beginning of an upload, and hangs up."""
    await receive()
    raise ConnectionResetError


async def _upload_altered(app: Any, scope: Any, receive: Any, send: Any) -> None:
    async def altered() -> Any:
        message = await receive()
        if body := message.get("body"):
            message = {**message, "body": body[:-1] + bytes([body[-1] ^ 1])}
        return message

    await app(scope, altered, send)


async def _echo(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """A hub that says in its error what it was sent."""
    headers = dict(scope["headers"])
    token = headers.get(b"authorization", b"nothing").decode()
    await sent(
        Reply(
            418,
            {"content-type": "application/json", "x-error-message": token},
            json.dumps({"error": token}).encode(),
        ),
        send,
    )


FAULTS: dict[str, Fault] = {
    "bit flip": Fault(TENSORS, edits(_flip)),
    "bit flip in the manifest": Fault(MANIFEST, edits(_flip)),
    "broken off": Fault(TENSORS, _cut),
    "truncated": Fault(TENSORS, edits(_shorten)),
    "lengthened": Fault(TENSORS, edits(_lengthen)),
    "dots in the listing": Fault(TREE, adds("../outside.json")),
    "absolute path in the listing": Fault(TREE, adds("/tmp/outside.json")),
    "backslash in the listing": Fault(TREE, adds("..\\outside.json")),
    "device in the listing": Fault(TREE, adds("con.json")),
    "two names of one file": Fault(TREE, adds("ADAPTERPACK.json")),
    "pickle in the listing": Fault(TREE, adds("training_args.bin")),
    "unlisted file": Fault(TREE, adds("more.json")),
    "missing file": Fault(TREE, lists(_drop_large)),
    "other size": Fault(TREE, lists(_other_size)),
    "other digest": Fault(TREE, lists(_other_digest)),
    "no digest": Fault(TREE, lists(_no_digest)),
    "endless listing": Fault(TREE, _endless),
    "listing is a page": Fault(TREE, answers(200, {"content-type": "text/html"}, b"<html>")),
    "busy": Fault(TENSORS, answers(429, {"retry-after": "0"})),
    "failing": Fault(TENSORS, answers(500)),
    "busy with its answer": Fault(INFO, answers(503)),
    "no commit header": Fault(TENSORS, edits(lambda reply: reply.headers.pop("x-repo-commit"))),  # type: ignore[arg-type,return-value]
    "other commit header": Fault(TENSORS, edits(lambda reply: reply.headers.update({"x-repo-commit": "0" * 40}))),
    "pause": Fault(TENSORS, _crawl),
    "trickle": Fault(TENSORS, _trickle),
    "redirect elsewhere": Fault(TENSORS, _redirects(lambda scope: f"http://localhost:{scope['server'][1]}{scope['path']}")),
    "redirect in circles": Fault(TENSORS, _redirects(lambda scope: scope["path"])),
    "redirect to a file": Fault(TENSORS, _redirects(lambda scope: "file:///etc/passwd")),
    "xet only": Fault(TENSORS, answers(403, {"x-xet-hash": "0" * 64})),
    "gone": Fault(TENSORS, answers(404, {"x-error-code": "EntryNotFound"})),
    "no commit": Fault(INFO, tells(lambda value: value.update(sha="main"))),
    "another repository": Fault(INFO, tells(lambda value: value.update(id="mallory/tickets"))),
    "gated": Fault(INFO, answers(403, {"x-error-code": "GatedRepo"})),
    "repository gone": Fault(INFO, answers(404, {"x-error-code": "RepoNotFound"})),
    "revision gone": Fault(INFO, answers(404, {"x-error-code": "RevisionNotFound"})),
    "token in the error": Fault(INFO, _echo),
    "ranges ignored": Fault(TENSORS, edits(_all_of_it)),
    "another range": Fault(TENSORS, edits(lambda reply: reply.headers.update({"content-range": "bytes 9-12/99"}))),
    "overtaken": Fault(r"POST .*/commit/.*", _overtake),
    "failing commit": Fault(r"POST .*/commit/.*", answers(500)),
    "busy commit": Fault(r"POST .*/commit/.*", answers(429, {"retry-after": "0"})),
    "failing upload": Fault(r"PUT /lfs/.*", answers(500)),
    "upload broken off": Fault(r"PUT /lfs/.*", _break_off),
    "stalled half way": Fault(r"GET .*/resolve/.*\.data$", _stall),
    "third part stalled": Fault(r"PUT /lfs/[0-9a-f]*/3", _hang),
    "upload altered": Fault(r"PUT /lfs/.*", _upload_altered),
}  # fmt: skip


class Layer:
    """Passes requests on to the hub unless a fault is armed for them."""

    def __init__(self, app: Any) -> None:
        self.app, self.name, self.times, self.seen, self.bytes = app, "", 0, 0, 0
        self.received = 0

    async def __call__(self, scope: Any, take: Any, tell: Any) -> None:
        async def send(message: Any) -> None:
            self.bytes += len(message.get("body", b""))
            await tell(message)

        async def receive() -> Any:
            message = await take()
            self.received += len(message.get("body", b""))
            return message

        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] == "/_faults":
            value = json.loads((await receive())["body"] or b"{}")
            before = {"seen": self.seen, "bytes": self.bytes, "received": self.received}
            self.name, self.times, self.seen, self.bytes = (
                value.get("name", ""),
                value.get("times", 1000),
                0,
                0,
            )
            await sent(Reply(200, {"content-type": "application/json"}, json.dumps(before).encode()), tell)
        elif (
            self.times
            and self.name
            and re.fullmatch(FAULTS[self.name].matches, f"{scope['method']} {scope['path']}")
        ):
            self.times, self.seen = self.times - 1, self.seen + 1
            await FAULTS[self.name].run(self.app, scope, receive, send)
        else:
            await self.app(scope, receive, send)


def main(folder: str, tokens: str) -> None:
    app = Layer(build(folder, Access.from_file(Path(tokens)), part=1 << 20))
    with listening("127.0.0.1", 0) as one:
        # whoever started it reads this
        print(f"http://127.0.0.1:{one.getsockname()[1]}", flush=True)  # noqa: T201
        uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False)).run(sockets=[one])


if __name__ == "__main__":
    main(*sys.argv[1:])
