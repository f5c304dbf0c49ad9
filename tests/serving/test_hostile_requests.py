"""Requests that are made to break a server: each has the right answer in less than a second, and a stream
that runs meanwhile goes on.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from servers import ANN, BOB, Served, waited

from adapterpack.http.http_error import HTTPError
from adapterpack.serving.openai.requests import ChatRequest
from adapterpack.serving.openai.response_requests import ResponseRequest
from adapterpack.serving.route import parse
from adapterpack.serving.tenants.limits import ServerLimits

HEAD = f"Host: localhost\r\nAuthorization: Bearer {ANN}\r\nContent-Type: application/json\r\n"


def post(body: Any, path: str = "/v1/chat/completions", lines: str = "", head: str = HEAD) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\n{head}Content-Length: {len(data)}\r\n{lines}\r\n".encode() + data


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "alpha", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **more}


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = {"a": value}
    return value


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


RECURSION = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}
SLASHES = "%2f..%2f..%2fetc%2fpasswd"
CASES: dict[str, tuple[bytes, int, str | None]] = {
    "no JSON": (post(b"{"), 400, "invalid_json"),
    "no UTF-8": (post(b'{"model": "\xff"}'), 400, "invalid_json"),
    "a byte order mark": (post(b"\xef\xbb\xbf{}"), 400, "invalid_json"),
    "an array": (post([1]), 400, "invalid_json"),
    "nothing": (post(b""), 400, "invalid_json"),
    "a key twice": (post(b'{"model": "alpha", "model": "gamma", "messages": []}'), 400, "invalid_json"),
    "NaN": (post(b'{"model": "alpha", "temperature": NaN}'), 400, "invalid_json"),
    "a number of 5,000 digits": (post(b'{"model": "alpha", "n": ' + b"9" * 5000 + b"}"), 400, "invalid_json"),
    "an infinite number": (post(b'{"model": "alpha", "temperature": 1e999}'), 400, "invalid_json"),
    "100,000 levels": (post(b"[" * 100_000), 400, "invalid_json"),
    "70 levels": (post(chat(guided_json=deep(70))), 400, "invalid_json"),
    "half of a character": (
        post(b'{"model": "alpha", "messages": [{"role": "user", "content": "\\ud800"}]}'),
        400,
        "invalid_json",
    ),
    "a million messages": (
        post(b'{"model": "alpha", "messages": [' + b"{}," * 1_000_000 + b"{}]}"),
        400,
        "invalid_json",
    ),
    "2,000 messages": (
        post(chat(messages=[{"role": "user", "content": "x"}] * 2000)),
        400,
        "invalid_request",
    ),
    "a body of 100 MB": (
        post(b"", lines="").replace(b"Content-Length: 0", b"Content-Length: 100000000"),
        413,
        "request_too_large",
    ),
    "a length that is none": (post(b"").replace(b"Content-Length: 0", b"Content-Length: -1"), 400, None),
    "two lengths": (post(b"{}", lines="Content-Length: 7\r\n"), 400, None),
    "length and chunks": (post(b"{}", lines="Transfer-Encoding: chunked\r\n"), 400, None),
    "chunks before they were": (
        post(b"", head=f"Transfer-Encoding: chunked\r\n{HEAD}")
        .replace(b"HTTP/1.1", b"HTTP/1.0")
        .replace(b"Content-Length: 0\r\n", b""),
        400,
        None,
    ),
    "chunks that are none": (
        f"POST /v1/completions HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
        400,
        None,
    ),
    "a body that stops": (
        post(b"{}").replace(b"Content-Length: 2", b"Content-Length: 20"),
        408,
        "request_too_slow",
    ),
    "200 headers": (
        post(chat(), lines="".join(f"X-{number}: x\r\n" for number in range(200))),
        431,
        "large_headers",
    ),
    "a head of 100 kB": (post(chat(), lines=f"X: {'x' * 100_000}\r\n"), 431, "large_headers"),
    "two hosts": (post(chat(), lines="Host: other\r\n"), 400, None),
    "a form": (
        post(b"model=alpha", head=HEAD.replace("application/json", "application/x-www-form-urlencoded")),
        415,
        None,
    ),
    "plain text of a foreign page": (
        post(chat(), head=HEAD.replace("application/json", "text/plain")),
        415,
        "unsupported_media_type",
    ),
    "a path": (post(chat(model="../../etc/passwd")), 404, "model_not_found"),
    "a hub id": (post(chat(model="hf://org/name")), 404, "model_not_found"),
    "a model with control characters": (post(chat(model="alpha\r\nX-Evil: 1\x00")), 404, "model_not_found"),
    "a model of a megabyte": (post(chat(model="a" * (1 << 20))), 404, "model_not_found"),
    "no model": (post({"messages": [{"role": "user", "content": "x"}]}), 400, "invalid_request"),
    "a path of a model's address": (f"GET /v1/models/{SLASHES} HTTP/1.1\r\n{HEAD}\r\n".encode(), 404, None),
    "another method": (
        f"DELETE /v1/chat/completions HTTP/1.1\r\n{HEAD}\r\n".encode(),
        405,
        "method_not_allowed",
    ),
    "another version": (b"POST /v1/chat/completions HTTP/x\r\nHost: localhost\r\n\r\n", 400, None),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n", 400, None),
    "a header without a name": (post(chat(), lines=": x\r\n"), 400, None),
    "a header with a zero": (post(chat(), lines="X: \x00\r\n"), 400, None),
    "a wrong key": (
        post(chat(), head="Host: localhost\r\nAuthorization: Bearer x\r\n"),
        401,
        "invalid_api_key",
    ),
    "a key of a megabyte": (
        post(chat(), head=f"Host: localhost\r\nAuthorization: Bearer {'x' * 30_000}\r\n"),
        401,
        "invalid_api_key",
    ),
    "a billion answers": (post(chat(n=10**9)), 400, "invalid_request"),
    "more answers than a key may have": (
        post(chat(n=64), head=HEAD.replace(ANN, BOB)),
        400,
        "invalid_request",
    ),
    "a long prompt": (post(chat(messages=[{"role": "user", "content": "x " * 400_000}])), 400, None),
    "token ids out of range": (
        post({"model": "alpha", "prompt": [10**12]}, "/v1/completions"),
        400,
        "invalid_request",
    ),
    "prompts of two kinds": (
        post({"model": "alpha", "prompt": [1, "x"]}, "/v1/completions"),
        400,
        "invalid_request",
    ),
    "1,000 prompts": (
        post({"model": "alpha", "prompt": ["x"] * 1000}, "/v1/completions"),
        400,
        "invalid_request",
    ),
    "100 stop texts": (post(chat(stop=["x"] * 100)), 400, "invalid_request"),
    "a long stop text": (post(chat(stop="x" * 10_000)), 400, "invalid_request"),
    "a bias of all tokens": (
        post(chat(logit_bias={str(number): 1 for number in range(20_000)})),
        400,
        "invalid_request",
    ),
    "a temperature of minus one": (post(chat(temperature=-1)), 400, "invalid_request"),
    "a field of another server": (post(chat(lora_path="/etc")), 400, "unknown_parameter"),
    "a picture by its address": (
        post(
            chat(
                messages=[
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}],
                    }
                ]
            )
        ),
        400,
        "invalid_request",
    ),
    "a part without a type": (
        post(chat(messages=[{"role": "user", "content": [{"text": "x"}]}])),
        400,
        "invalid_request",
    ),
    "a schema without end": (post(chat(guided_json=RECURSION)), 400, None),
    "a large schema": (post(chat(guided_json={"enum": ["x" * 100_000]})), 400, "invalid_request"),
    "no expression": (post(chat(guided_regex="(")), 400, "invalid_request"),
    "an expression that counts": (
        post(chat(guided_regex="(((a{1,1000}){1,1000}){1,1000}){1,1000}")),
        200,
        None,
    ),
    "an expression that looks back": (post(chat(guided_regex=r"(a)\1")), 400, "invalid_request"),
    "no grammar": (post(chat(guided_grammar="start: [")), 400, "invalid_request"),
    "10,000 tools": (
        post(chat(tools=[tool(f"f{number}") for number in range(10_000)])),
        400,
        "invalid_request",
    ),
    "a tool of 70 levels": (post(chat(tools=[tool("f", parameters=deep(70))])), 400, "invalid_json"),
    "a tool with a name of a megabyte": (post(chat(tools=[tool("f" * (1 << 20))])), 400, "invalid_request"),
    "tools where none are known": (post(chat(tools=[tool("f")])), 400, "no_tool_format"),
    "arguments of 100,000 levels": (
        post(
            chat(
                messages=[
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "a",
                                "type": "function",
                                "function": {"name": "f", "arguments": "[" * 100_000},
                            }
                        ],
                    }
                ]
            )
        ),
        400,
        "invalid_request",
    ),
    "tokens of a call without arguments": (
        post(
            {
                "model": "alpha",
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}
                        ],
                    }
                ],
            },
            "/tokenize",
        ),
        400,
        "invalid_request",
    ),
    "2,000 items": (
        post({"model": "alpha", "input": [{"role": "user", "content": "x"}] * 2000}, "/v1/responses"),
        400,
        "invalid_request",
    ),
    "an item of another kind": (
        post({"model": "alpha", "input": [{"type": "item_reference", "id": "../x"}]}, "/v1/responses"),
        400,
        "invalid_request",
    ),
    "a response of somebody": (
        post({"model": "alpha", "input": "x", "previous_response_id": "resp-1"}, "/v1/responses"),
        400,
        "nothing_stored",
    ),
    "nine adapters": (post(chat(model="base", adapters=[{"name": "alpha"}] * 9)), 400, "invalid_request"),
    "a weight without end": (
        post(chat(model="base", adapters=[{"name": "alpha", "weight": 1e308}])),
        400,
        "invalid_request",
    ),
    "an adapter by its path": (
        post(chat(model="base", adapters=[{"name": "../alpha"}])),
        404,
        "model_not_found",
    ),
}


def answered(server: Served, data: bytes) -> tuple[int, str]:
    """Status and body of the first answer on a connection of its own."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
            head, found, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: ([0-9]+)", head)
            if found and length and len(body) >= int(length[1]):
                break
    return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2].decode()


@pytest.fixture(scope="module")
def stream(server: Served) -> Iterator[list[str]]:
    """The lines of streams that somebody else reads all the while."""
    heard: list[str] = []
    ending = threading.Event()

    def read() -> None:
        body = {"model": "gamma", "prompt": "x", "max_tokens": 400, "min_tokens": 400, "stream": True}
        while not ending.is_set():
            with httpx.stream(
                "POST", f"{server.address}/v1/completions", json=body, headers=server.headers, timeout=120
            ) as answer:
                assert answer.status_code == 200
                heard.extend(filter(None, answer.iter_lines()))
                assert heard[-1] == "data: [DONE]"

    thread = threading.Thread(target=read)
    thread.start()
    yield heard
    ending.set()
    thread.join()


@pytest.mark.parametrize("name", CASES)
def test_each_is_refused_at_once(name: str, server: Served, stream: list[str]) -> None:
    """The status and the code that clients know it by, in OpenAI's shape, in seconds; no path of this
    machine in it, and the streams of others go on.
    """
    data, status, code = CASES[name]
    before, start = len(stream), time.monotonic()
    found, body = answered(server, data)
    assert time.monotonic() - start < 30  # a crowded machine may be slow
    assert found == status, body
    assert "/tmp" not in body and "site-packages" not in body
    if code is not None:
        error = json.loads(body)["error"]
        assert error["code"] == code
        assert error["message"] and error["type"]
    waited(lambda: len(stream) > before)


def test_who_still_sends_hears_the_refusal(server: Served) -> None:
    """4 MB behind a head that is refused without a look at them: a status, and no reset."""
    body = b"x" * (4 << 20)
    large = post(body * 2)
    keyless = post(body, head="Host: localhost\r\n")
    for data, status in (
        (keyless, b"401"),
        (post(body, "/none"), b"404"),
        (post(body, "/health"), b"405"),
        (large, b"413"),
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
            connection.sendall(data)
            assert connection.recv(12) == b"HTTP/1.1 " + status, status


def test_a_long_head_that_comes_in_pieces_hears_the_refusal(server: Served) -> None:
    """It is refused before its end is there, which would have reset the connection."""
    data = post(chat(), lines=f"X: {'x' * 1_000_000}\r\n")
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        for start in range(0, len(data), 60_000):
            connection.sendall(data[start : start + 60_000])
            time.sleep(0.01)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "large_headers"


@pytest.mark.parametrize("line", ["Transfer-Encoding: chunked\r\n", "transfer-encoding: Chunked\r\nX: y\r\n"])
def test_what_follows_a_request_with_two_lengths_is_not_answered(line: str, server: Served) -> None:
    """By one of them it is the request of somebody else: 400, and the connection is closed."""
    inner = f"GET /v1/models HTTP/1.1\r\n{HEAD}\r\n".encode()
    smuggled = post(b"0\r\n\r\n" + inner, lines=line)
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        connection.sendall(smuggled)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("shared", [False, True])
def test_no_key_finds_what_was_read_of_the_prompts_of_another(
    shared: bool, server: Served, start: Callable[..., Served]
) -> None:
    """It could tell by the time that its own takes what others have asked; only an operator may share
    prompts. ``cache_salt`` is vLLM's.
    """
    asked = start(share_prefixes=True) if shared else server

    def found(key: str, path: str = "/v1/completions", **more: Any) -> bool:
        def known() -> float:
            (line,) = (
                line
                for line in asked.get("/metrics").text.splitlines()
                if line.startswith("adapterpack_prompt_tokens_reused")
            )
            return float(line.split()[1])

        before, headers = known(), {"Authorization": f"Bearer {key}"}
        form = (
            {"input": "secret " * 40}
            if path.endswith("responses")
            else {"prompt": "secret " * 40, "max_tokens": 1}
        )
        assert asked.post(path, {"model": "alpha", **form, **more}, headers=headers).status_code == 200
        return known() > before

    assert [found(ANN), found(ANN), found(BOB), found(BOB)] == [False, True, shared, True]
    assert [found(ANN, cache_salt="a"), found(ANN, cache_salt="a"), found(BOB, cache_salt="a")] == [
        False,
        True,
        shared,
    ]
    said = {"path": "/v1/responses", "max_output_tokens": 1}
    assert [found(ANN, cache_salt=salt, **said) for salt in "ccd"] == [False, True, False]
    assert (
        asked.post("/v1/completions", {"model": "alpha", "prompt": "x", "cache_salt": ""}).status_code == 400
    )


def test_the_server_is_well_afterwards(server: Served) -> None:
    """No step failed, and nothing was a bug."""
    assert server.get("/health").json() == {"status": "ok"}
    assert "bug" not in server.log.read_text()
    assert "Traceback" not in server.log.read_text()
    assert "Invalid HTTP" not in server.log.read_text()  # anybody could fill the log with it
    (malformed,) = (
        line
        for line in server.get("/metrics").text.splitlines()
        if line.startswith("adapterpack_malformed_requests")
    )
    assert float(malformed.split()[1]) > 0


@pytest.mark.parametrize(
    ("kind", "field", "part"),
    [
        (ChatRequest, "messages", {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}),
        (ResponseRequest, "input", {"type": "input_file", "file_id": "f"}),
    ],
)
def test_content_of_another_kind_is_refused_with_the_way_out(kind: type[Any], field: str, part: Any) -> None:
    """By the place of its kind, and what may be there."""
    request = {"model": "alpha", field: [{"role": "user", "content": [{"type": "text", "text": "Hi"}, part]}]}
    words = rf"expected one of .*'text', .*found '{part['type']}'; .*images in data URLs"
    with pytest.raises(HTTPError, match=words) as refused:
        parse(json.dumps(request).encode(), kind, ServerLimits())
    assert refused.value.status == 400
    assert str(refused.value.what).startswith(f"{field}.0.content.1.type: ")
