"""How a server is used: read this first. ``server`` has one base and the adapters alpha, beta and gamma."""

from __future__ import annotations

import openai
import pytest
from servers import ANN, BOB, Served

QUESTION = [{"role": "user", "content": "Where is my parcel?"}]


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=ANN, max_retries=0, timeout=120)


def test_list_the_models(client: openai.OpenAI) -> None:
    """The base and every adapter is a model by name."""
    assert [model.id for model in client.models.list()] == ["base", "alpha", "beta", "gamma"]


def test_chat_with_an_adapter(client: openai.OpenAI, server: Served) -> None:
    """The name of the model chooses the adapter; the answer says by its digest which bytes answered."""
    answer = client.chat.completions.create(model="alpha", messages=QUESTION, max_tokens=5)  # type: ignore[arg-type]
    assert answer.choices[0].message.content
    assert answer.system_fingerprint == server.adapters["alpha"]


def test_stream_an_answer(client: openai.OpenAI) -> None:
    """The pieces of a stream together are the answer that comes whole at temperature 0."""
    asked = {"model": "beta", "messages": QUESTION, "max_tokens": 5, "temperature": 0}
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
        if chunk.choices
    ]
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    assert "".join(pieces) == whole.choices[0].message.content


def test_a_key_opens_only_its_own_adapters(client: openai.OpenAI) -> None:
    """Bob's key is for alpha alone: others look as if they were not there."""
    bob = client.with_options(api_key=BOB)
    assert [model.id for model in bob.models.list()] == ["alpha"]
    with pytest.raises(openai.NotFoundError):
        bob.chat.completions.create(model="beta", messages=QUESTION)  # type: ignore[arg-type]
