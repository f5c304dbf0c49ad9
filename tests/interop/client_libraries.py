"""LangChain's and LlamaIndex' clients of OpenAI against our servers: whole, streamed, asynchronous,
structured, with tools, and vectors.

``with_servers.py`` starts the servers, and ``.ci/client-libraries`` the environment in which this runs: it
has no adapterpack.
"""

from __future__ import annotations

import asyncio
import functools
import json
import operator
import os
from typing import Any

import openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict, Field

TEXTS, VECTORS, KEY = (
    os.environ[name] for name in ("OPENAI_BASE_URL", "EMBEDDINGS_BASE_URL", "OPENAI_API_KEY")
)
PROMPT, TOKENS = "Order two mugs for Lisbon", 12
SENTENCES = ["Where is my parcel?", "I love this kettle"]


class Order(BaseModel):
    """An order, as an answer or as the arguments of a tool."""

    model_config = ConfigDict(extra="forbid")
    item: str = Field(pattern="^(mug|plate)$")
    count: int = Field(ge=1, le=9)


def order(item: str, count: int) -> str:
    """Orders something."""
    return f"{count} {item}"


def right(model: str) -> str:
    """What OpenAI's own client hears."""
    answer = openai.OpenAI().chat.completions.create(
        model=model, messages=[{"role": "user", "content": PROMPT}], max_tokens=TOKENS
    )
    return answer.choices[0].message.content or ""


async def langchain(model: str) -> None:
    """``ChatOpenAI``, as its users call it."""
    expected = right(model)
    chat: Any = ChatOpenAI(model=model, max_completion_tokens=TOKENS)
    assert chat.invoke(PROMPT).content == expected
    assert (await chat.ainvoke(PROMPT)).content == expected
    assert "".join(chunk.content for chunk in chat.stream(PROMPT)) == expected
    assert "".join([chunk.content async for chunk in chat.astream(PROMPT)]) == expected
    assert [answer.content for answer in chat.batch([PROMPT] * 4)] == [expected] * 4
    usage = chat.invoke(PROMPT).usage_metadata
    assert usage["output_tokens"] == TOKENS and usage["input_tokens"] > 0
    newer: Any = ChatOpenAI(model=model, max_completion_tokens=TOKENS, use_responses_api=True)
    assert newer.invoke(PROMPT).text == expected
    longer: Any = ChatOpenAI(model=model, max_completion_tokens=100)
    for method in ("json_schema", "function_calling"):
        assert isinstance(longer.with_structured_output(Order, method=method).invoke(PROMPT), Order)
    calling = longer.bind_tools([Order], tool_choice="any", parallel_tool_calls=False)
    (call,) = calling.invoke(PROMPT).tool_calls
    chunks = list(calling.stream(PROMPT))
    (streamed,) = functools.reduce(operator.add, chunks).tool_calls
    assert Order(**call["args"]) and (call["name"], call["args"]) == (streamed["name"], streamed["args"])
    assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) > 1


async def llama_index(model: str) -> None:
    """``OpenAILike``, as its users call it."""
    expected = right(model)
    common: dict[str, Any] = {
        "model": model,
        "api_base": TEXTS,
        "api_key": KEY,
        "context_window": 512,
        "temperature": 0,
    }
    chat = OpenAILike(**common, is_chat_model=True, max_tokens=TOKENS)
    messages = [ChatMessage(role="user", content=PROMPT)]
    assert chat.chat(messages).message.content == expected
    assert (await chat.achat(messages)).message.content == expected
    assert [chunk.message.content for chunk in chat.stream_chat(messages)][-1] == expected
    assert [chunk.message.content async for chunk in await chat.astream_chat(messages)][-1] == expected
    text = OpenAILike(**common, is_chat_model=False, max_tokens=TOKENS)
    plain = openai.OpenAI().completions.create(model=model, prompt=PROMPT, max_tokens=TOKENS).choices[0].text
    assert text.complete(PROMPT).text == plain
    assert [chunk.text for chunk in text.stream_complete(PROMPT)][-1] == plain
    calling = OpenAILike(**common, is_chat_model=True, is_function_calling_model=True, max_tokens=100)
    asked: dict[str, Any] = {
        "tools": [FunctionTool.from_defaults(fn=order, fn_schema=Order)],
        "user_msg": PROMPT,
        "tool_required": True,
    }
    (call,) = calling.get_tool_calls_from_response(calling.chat_with_tools(**asked))
    *_, last = calling.stream_chat_with_tools(**asked)
    (streamed,) = calling.get_tool_calls_from_response(last)
    assert (
        call.tool_name == "order" and order(**call.tool_kwargs) and streamed.tool_kwargs == call.tool_kwargs
    )
    assert isinstance(calling.as_structured_llm(Order).complete(PROMPT).raw, Order)


def embeddings() -> None:
    """Vectors by all three clients; LangChain's counts tokens by OpenAI's own tokenizer unless it is told not
    to.
    """
    client = openai.OpenAI(base_url=VECTORS)
    expected = [item.embedding for item in client.embeddings.create(model="alpha", input=SENTENCES).data]
    chain = OpenAIEmbeddings(model="alpha", base_url=VECTORS, check_embedding_ctx_length=False)
    index = OpenAILikeEmbedding(model_name="alpha", api_base=VECTORS, api_key=KEY)
    assert len(expected[0]) == 384
    for vectors in (
        chain.embed_documents(SENTENCES),
        [chain.embed_query(text) for text in SENTENCES],
        index.get_text_embedding_batch(SENTENCES),
        [index.get_query_embedding(text) for text in SENTENCES],
    ):
        for vector, right_one in zip(vectors, expected, strict=True):
            assert max(abs(a - b) for a, b in zip(vector, right_one, strict=True)) < 1e-5


def main() -> None:
    """All of it, for two adapters and the base."""
    texts = {}
    for model in ("base", "alpha", "beta"):
        asyncio.run(langchain(model))
        asyncio.run(llama_index(model))
        texts[model] = right(model)
    assert len(set(texts.values())) == 3
    embeddings()
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
