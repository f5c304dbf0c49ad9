"""A server of a model whose layers keep states answers as transformers does each request alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from servers import ANN, WAIT, Served, waited
from test_streams import chat, request
from tiny import write_bundle, write_model, write_packs
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapterpack import attach, load

TOKENS = 8


@pytest.mark.long
def test_rows_of_a_hybrid_model(smollm2: Path, launch: Callable[..., Served], tmp_path: Path) -> None:
    """More requests than rows, chats and texts, streamed and whole, with another adapter in each, while one
    client goes away; then a conversation that goes on.
    """
    fields = {"layer_types": ["conv", "full_attention"], "pad_token_id": 2, "initializer_range": 0.3}
    model = write_model(tmp_path / "model", smollm2, "lfm2", **fields)
    packs = write_packs(tmp_path / "packs", model, ("alpha", "beta"))
    bundle = write_bundle(tmp_path / "bundle", model, [packs / "alpha", packs / "beta"])
    server = launch(bundle)
    tokenizer = AutoTokenizer.from_pretrained(model)
    models: dict[str, Any] = {"base": AutoModelForCausalLM.from_pretrained(model).eval()}
    for name in ("alpha", "beta"):
        models[name] = attach(AutoModelForCausalLM.from_pretrained(model).eval(), load(packs / name))

    def right(name: str, messages: list[dict[str, str]] | None, text: str = "") -> str:
        ids = (
            tokenizer(text).input_ids
            if messages is None
            else tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )
        whole = models[name].generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
        return str(tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True))

    def user(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    async def one(client: openai.AsyncOpenAI, name: str, text: str, form: int) -> str:
        options: Any = {"model": name, "max_tokens": TOKENS, "temperature": 0}
        if form == 0:
            return (await client.completions.create(prompt=text, **options)).choices[0].text
        if form == 1:
            answer = await client.chat.completions.create(messages=user(text), **options)
            return answer.choices[0].message.content or ""
        pieces = await client.chat.completions.create(messages=user(text), stream=True, **options)
        return "".join([part.choices[0].delta.content or "" async for part in pieces if part.choices])

    asked = [
        (name, f"{'Where is ' * (number % 4)}order {number}?", number % 3)
        for number, name in enumerate(("base", "alpha", "beta", "alpha") * 3)
    ]

    async def every() -> list[str]:
        address = {"base_url": f"{server.address}/v1", "api_key": ANN, "max_retries": 0, "timeout": WAIT}
        async with openai.AsyncOpenAI(**address) as client:  # type: ignore[arg-type]
            return await asyncio.gather(*(one(client, *what) for what in asked))

    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as connection:
        connection.sendall(request("/v1/chat/completions", chat(max_tokens=400, min_tokens=400, n=2)))
        waited(server.rows)
    answers = asyncio.run(every())
    for (name, text, form), answer in zip(asked, answers, strict=True):
        assert answer == right(name, user(text) if form else None, text), (name, text, form)
    assert len(set(answers)) > len(asked) // 2
    waited(lambda: not server.rows())
    messages = user("Where is my parcel?")
    for _ in range(3):
        said = server.post(
            "/v1/chat/completions",
            {"model": "beta", "messages": messages, "max_tokens": TOKENS, "temperature": 0},
        ).json()["choices"][0]["message"]["content"]
        assert said == right("beta", messages)
        messages = [*messages, {"role": "assistant", "content": said}, *user("And now?")]
