"""Anthropic's Messages API: events, counts and errors in its form. Its own client asks in
``tests/interop/anthropic_client.py``.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import pytest
from servers import ANN, Served

from adapterpack.http.http_error import HTTPError
from adapterpack.serving.anthropic.message_requests import MessagesRequest
from adapterpack.serving.anthropic.messages_writer import MessagesWriter
from adapterpack.serving.openai.answers import Provenance

ASKED = {
    "model": "alpha",
    "messages": [{"role": "user", "content": "Two mugs"}],
    "max_tokens": 6,
    "temperature": 0,
}
KEY = {"x-api-key": ANN, "anthropic-version": "2023-06-01"}


def events(server: Served, body: Any) -> list[tuple[str, Any]]:
    answer = server.post("/v1/messages", {**body, "stream": True}, headers=KEY)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    named = [one.partition("\n") for one in answer.text.split("\n\n") if one.startswith("event: ")]
    return [
        (head.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for head, _, data in named
    ]


def test_a_message_is_the_chats_answer(server: Served) -> None:
    """Whole and streamed: text, reasons and counts are those of the chat's route, and ``cached_tokens`` are
    not among the tokens that were read.
    """
    long = {
        **ASKED,
        "messages": [{"role": "user", "content": "Two mugs and a plate " * 6}],
        "cache_salt": "m",
    }
    first, again = (server.post("/v1/messages", long, headers=KEY).json() for _ in range(2))
    chat = server.post("/v1/chat/completions", long).json()
    assert (
        first["content"]
        == again["content"]
        == [{"type": "text", "text": chat["choices"][0]["message"]["content"], "citations": None}]
    )
    known = chat["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert known > 0 and again["usage"]["cache_read_input_tokens"] == known
    assert (
        first["usage"]["input_tokens"]
        == known + again["usage"]["input_tokens"]
        == chat["usage"]["prompt_tokens"]
    )
    assert (first["stop_reason"], first["stop_sequence"], first["role"]) == ("max_tokens", None, "assistant")
    assert first["adapterpack"]["digest"] == server.adapters["alpha"]
    counted = {name: long[name] for name in ("model", "messages")}
    assert server.post("/v1/messages/count_tokens", counted, headers=KEY).json() == {
        "input_tokens": chat["usage"]["prompt_tokens"]
    }
    heard = events(server, long)
    assert all(name == data["type"] for name, data in heard)
    assert [name for name, _ in heard if name != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert heard[0][1]["message"]["usage"]["cache_read_input_tokens"] == known
    text = "".join(data["delta"]["text"] for name, data in heard if name == "content_block_delta")
    assert text == first["content"][0]["text"]
    assert heard[-2][1]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert heard[-2][1]["usage"]["output_tokens"] == 6
    stop = text[2:5]
    *_, (_, last), _ = events(server, {**long, "stop_sequences": [stop]})
    assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}


@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
            400,
            "invalid_request_error",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "invalid_request_error"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image",
                                "source": {"type": "base64", "media_type": "image/png", "data": "aGk="},
                            }
                        ],
                    }
                ]
            },
            400,
            "invalid_request_error",
        ),
        ({"messages": [{"role": "assistant", "content": " "}]}, 400, "invalid_request_error"),
        (
            {"tools": [{"type": "bash_20250124", "name": "bash", "input_schema": {}}]},
            400,
            "invalid_request_error",
        ),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error"),
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"model": "nobody"}, 404, "not_found_error"),
    ],
)
def test_errors_have_anthropics_form(server: Served, change: dict[str, Any], status: int, kind: str) -> None:
    """What is no request, no model or no key."""
    answer = server.post("/v1/messages", {**ASKED, **change}, headers=KEY)
    assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (
        status,
        "error",
        kind,
    )


def test_a_stream_that_fails_ends_with_an_error_in_its_form() -> None:
    """What a deadline, for one, makes of a stream: an event of the kind that Anthropic's clients raise."""
    provenance = Provenance("alpha", "sha256:0", "base")
    writer = MessagesWriter(msgspec.convert(ASKED, MessagesRequest), provenance, None)
    head, _, data = writer.error(HTTPError(503, "engine-stopped", "it ended")).decode().partition("\n")
    error = json.loads(data.removeprefix("data: "))
    assert (head, error["type"], error["error"]["type"]) == ("event: error", "error", "overloaded_error")


def test_its_clients_put_the_key_elsewhere(server: Served) -> None:
    """In ``x-api-key``, on every route; a wrong one is refused."""
    assert httpx.get(f"{server.address}/v1/models", headers=KEY).status_code == 200
    refused = server.post("/v1/messages", ASKED, headers={"x-api-key": "nobody"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
