"""What goes over the wire: the bytes of a stream, what ends a request, and what a server writes down of
it.
"""

from __future__ import annotations

import json
import re
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest
from servers import ANN, BOB, OLD, WAIT, Served, waited
from shipped_schemas import unlike

from adapterpack.http.port import listening
from adapterpack.serving.routes import ROUTES


def request(path: str, body: Any, key: str = ANN, *lines: str) -> bytes:
    data = json.dumps(body).encode()
    head = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {key}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *lines,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def sent(server: Served, data: bytes) -> bytes:
    """All that a server answers on a connection of its own."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


def dechunked(answer: bytes) -> tuple[bytes, bytes]:
    """Head and body of an answer in chunks."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return head, body


def chat(**more: Any) -> dict[str, Any]:
    return {
        "model": "alpha",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "temperature": 0,
        **more,
    }


def test_the_bytes_of_a_chat(server: Served) -> None:
    """Role first, then content, a chunk with the reason, one with the usage, and the end; the digest in the
    head and in every chunk.
    """
    head, body = dechunked(
        sent(
            server,
            request(
                "/v1/chat/completions",
                chat(stream=True, stream_options={"include_usage": True}),
                ANN,
                "Connection: close",
                "X-Request-Id: my-own.id_1",
            ),
        )
    )
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    digest = server.adapters["alpha"].encode()
    assert lines[b"content-type"] == b"text/event-stream"
    assert (lines[b"x-adapterpack-adapter"], lines[b"x-adapterpack-digest"], lines[b"x-request-id"]) == (
        b"alpha",
        digest,
        b"my-own.id_1",
    )
    events = body.split(b"\n\n")
    assert events.pop() == b""
    assert events.pop() == b"data: [DONE]"
    assert all(event.startswith(b'data: {"id":"chatcmpl-') and b"\n" not in event for event in events)
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert {(chunk["object"], chunk["model"], chunk["system_fingerprint"].encode()) for chunk in chunks} == {
        ("chat.completion.chunk", "alpha", digest)
    }
    assert chunks[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert chunks[0]["adapterpack"] == {
        "adapter": "alpha",
        "digest": server.adapters["alpha"],
        "base": "base",
    }
    assert all(chunk["choices"][0]["delta"].keys() == {"content"} for chunk in chunks[1:-2])
    assert chunks[-2]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_the_bytes_of_a_text_with_two_answers(server: Served) -> None:
    """Every answer has its index, its prompt if it is wanted, and one reason; whole and streamed are the
    same.
    """
    body = {"model": "beta", "prompt": ["One", "Two"], "max_tokens": 6, "temperature": 0, "echo": True}
    whole = server.post("/v1/completions", body)
    assert (
        whole.headers["x-adapterpack-digest"]
        == whole.json()["adapterpack"]["digest"]
        == server.adapters["beta"]
    )
    with httpx.stream(
        "POST",
        f"{server.address}/v1/completions",
        json={**body, "stream": True},
        headers=server.headers,
        timeout=WAIT,
    ) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events.pop() == "[DONE]"
    texts, reasons = ["", ""], dict[int, str]()
    for event in events:
        [choice] = json.loads(event)["choices"]
        assert "usage" not in json.loads(event)
        assert choice["index"] not in reasons
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert [(choice["text"], choice["finish_reason"]) for choice in whole.json()["choices"]] == [
        (text, reasons[place]) for place, text in enumerate(texts)
    ]
    assert texts[0].startswith("One") and texts[1].startswith("Two")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_rows(server: Served, stream: bool) -> None:
    """The engine stops working for it at once, and the audit says so."""
    before = len(server.audited())
    with server.held():
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
            connection.sendall(
                request("/v1/chat/completions", chat(max_tokens=400, min_tokens=400, n=3, stream=stream))
            )
            waited(server.rows)
        [line] = waited(
            lambda: [line for line in server.audited()[before:] if line["route"].startswith("POST")]
        )
    waited(lambda: not server.rows())
    assert line["outcome"] == "disconnected"
    assert line["completion_tokens"] < 3 * 400


def test_the_document_is_true(server: Served) -> None:
    """What the server takes and answers fits the schemas of its OpenAPI document; what it refuses does
    not.
    """
    document = server.get("/openapi.json").json()

    def fits(name: str, value: Any) -> bool:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        return bool(jsonschema.Draft202012Validator(schema).is_valid(value))

    assert unlike(document) == []
    text = {"model": "alpha", "prompt": "x", "max_tokens": 2}
    said = chat(max_tokens=2)
    routes: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("/v1/chat/completions", "ChatRequest", "ChatCompletion", chat(logprobs=True, top_logprobs=1)),
        ("/v1/completions", "CompletionRequest", "Completion", {**text, "logprobs": 1}),
        (
            "/v1/responses",
            "ResponseRequest",
            "ResponseAnswer",
            {"model": "alpha", "input": "x", "max_output_tokens": 2},
        ),
        ("/v1/messages", "MessagesRequest", "MessageAnswer", said),
        (
            "/v1/messages/count_tokens",
            "MessagesPrompt",
            "TokensCount",
            {name: said[name] for name in ("model", "messages")},
        ),
        ("/tokenize", "TokenizeRequest", "Tokens", {"model": "alpha", "prompt": "x"}),
        ("/detokenize", "DetokenizeRequest", "Text", {"model": "alpha", "tokens": [5]}),
    )
    for path, request_name, answer_name, good in routes:
        operation = document["paths"][path]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
            f"/{request_name}"
        )
        answer = server.post(path, good)
        assert fits(request_name, good) and answer.status_code == 200 and fits(answer_name, answer.json())
        if events := operation["responses"]["200"]["content"].get("text/event-stream"):
            written = {
                "components": document["components"],
                **events["schema"]["properties"]["data"]["anyOf"][1]["contentSchema"],
            }
            lines = [
                line[6:]
                for line in server.post(path, {**good, "stream": True}).text.splitlines()
                if line.startswith("data: {")
            ]
            assert lines and all(
                jsonschema.Draft202012Validator(written).is_valid(json.loads(line)) for line in lines
            )
        for change in (
            {"lora_path": "x"},
            {"n": 0},
            {"model": 5},
            {"stop": {}},
            {"temperature": "hot"},
            {"logit_bias": []},
            {"response_format": {"type": "xml"}},
            {"stream_options": {"x": 1}},
            {"max_tokens": 1.5},
        ):
            answer = server.post(path, {**good, **change})
            assert not fits(request_name, {**good, **change}), change
            error = "MessageError" if "/messages" in path else "ErrorAnswer"
            assert answer.status_code == 400 and fits(error, answer.json())
    assert fits("ModelList", server.get("/v1/models").json())
    answered = {
        f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods
    }
    own = {
        "GET /openapi.json",
        "GET /v1/status",
        "GET /v1/status/models",
        *(f"POST {path}" for path, *_ in routes),
    }
    assert {f"{route.method} {route.path}" for route in ROUTES} | own == answered


def test_what_is_written_down(server: Served) -> None:
    """One line a request, with key, digest and counts, and nothing of what was said; metrics by adapter,
    which a tenant may not see.
    """
    before = len(server.audited())
    secret = "Xylophone"
    for name, key in (("alpha", BOB), ("gamma", BOB), ("gamma", ANN)):
        server.post(
            "/v1/completions",
            {"model": name, "prompt": secret, "max_tokens": 3},
            headers={"Authorization": f"Bearer {key}"},
        )
    lines = server.audited()[before:]
    digests = server.adapters
    assert [(line["key"], line["digest"], line["status"], line["outcome"]) for line in lines] == [
        ("bob", digests["alpha"], 200, "length"),
        ("bob", None, 404, "model_not_found"),
        ("ann", digests["gamma"], 200, "length"),
    ]
    assert all(
        line["completion_tokens"] == 3 and 0 < line["first_token_seconds"] <= line["seconds"]
        for line in lines
        if line["digest"]
    )
    assert not any(word in server.audit.read_text() + server.log.read_text() for word in (secret, ANN, BOB))
    text = server.get("/metrics").text
    assert re.search(r'^adapterpack_generation_tokens_total\{adapter="gamma"\} [1-9]', text, re.MULTILINE)
    assert "nobody" not in text
    assert server.get("/metrics", headers={"Authorization": f"Bearer {BOB}"}).status_code == 403


def test_keys(server: Served) -> None:
    """Without a key, with an unknown one, another scheme, or one whose time is over nobody is let in; probes
    need none.
    """
    for given in ("", "Bearer nope", f"Basic {ANN}", f"Bearer {OLD}", f"Bearer {ANN}x", "Bearer"):
        answer = server.get("/v1/models", headers={"Authorization": given})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert [server.get(path, headers={}).status_code for path in ("/health", "/ready", "/version")] == [
        200,
        200,
        401,
    ]
    wrong = httpx.delete(f"{server.address}/v1/models", timeout=WAIT)
    assert (wrong.status_code, "GET" in wrong.headers["allow"]) == (405, True)


def test_what_is_written_to_a_connection_is_sent_at_once() -> None:
    """The body of an answer does not wait until the client has acknowledged its head."""
    with (
        listening("127.0.0.1", 0) as one,
        socket.create_connection(one.getsockname()),
        one.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.long
def test_a_connection_is_kept_longer_than_clients_keep_it(server: Served) -> None:
    """The server does not end one at the moment at which clients on httpx, whose limit is 5 s, may send their
    next request.
    """
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
        for pause in (0, 6):
            time.sleep(pause)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):  # its head and its body may come apart
                answer += (piece := connection.recv(1 << 16))
                assert piece
            assert answer.startswith(b"HTTP/1.1 200")


def test_fairness_between_keys(server: Served) -> None:
    """Ann fills the engine's four rows and the queue; Bob's short request, which came last, ends before her
    last ones begin.
    """
    before = len(server.audited())

    def ask(key: str, **body: Any) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return server.post("/v1/chat/completions", chat(**body), headers=headers).status_code

    with ThreadPoolExecutor(7) as pool:
        with server.held():
            asked = [pool.submit(ask, ANN, n=4, max_tokens=20, min_tokens=20) for _ in range(6)]
            waited(lambda: server.rows() == 24)
            asked.append(pool.submit(ask, BOB, max_tokens=4))
            waited(lambda: server.rows() == 25)
        assert {one.result() for one in asked} == {200}
    ends = [line["key"] for line in server.audited()[before:] if line["rows"]]
    assert len(ends) == 7
    # in order of arrival: all six
    assert ends.index("bob") <= 4


def test_too_many_at_a_time(server: Served) -> None:
    """Bob may have four rows: a fifth is 429 with the seconds to wait, and Ann is let in meanwhile."""

    def ask(key: str, **body: Any) -> tuple[int, str | None]:
        headers = {"Authorization": f"Bearer {key}"}
        answer = server.post("/v1/chat/completions", chat(**body), headers=headers)
        return answer.status_code, answer.headers.get("retry-after")

    with ThreadPoolExecutor(4) as pool:
        with server.held():
            asked = [pool.submit(ask, BOB, n=3, max_tokens=150, min_tokens=150) for _ in range(3)]
            waited(lambda: sum(map(Future.done, asked)) == 2)
            refused = [one.result() for one in asked if one.done()]
            assert all(status == 429 and after and 1 <= int(after) <= 60 for status, after in refused)
            ann = pool.submit(ask, ANN)
            waited(lambda: server.rows() == 4)
        assert ann.result() == (200, None)
        assert sorted(one.result()[0] for one in asked) == [200, 429, 429]
