"""LiteLLM, pydantic-ai, and LangChain's client of Anthropic against a server of texts, by OpenAI's routes and by
Anthropic's: whole, streamed, asynchronous, structured. What they hear is what OpenAI's own client hears.

``with_servers.py`` starts the server, and ``.ci/client-libraries`` the environment in which this runs: it has
no adapterpack.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import litellm
import openai
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

URL, OTHER, KEY = (os.environ[name] for name in ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "OPENAI_API_KEY"))
PROMPT, TOKENS = "Order two mugs for Lisbon", 12
ASKED: Any = [{"role": "user", "content": PROMPT}]


class Order(BaseModel):
    """An order, as an answer."""

    model_config = ConfigDict(extra="forbid")
    item: str = Field(pattern="^(mug|plate)$")
    count: int = Field(ge=1, le=9)


def right(model: str) -> str:
    """What OpenAI's own client hears."""
    answer = openai.OpenAI().chat.completions.create(model=model, messages=ASKED, max_tokens=TOKENS)
    return answer.choices[0].message.content or ""


async def by_litellm(model: str) -> None:
    """``completion``, for OpenAI's routes and for Anthropic's."""
    expected = right(model)
    for provider, address in (("openai", URL), ("anthropic", OTHER)):
        given: dict[str, Any] = {
            "model": f"{provider}/{model}",
            "messages": ASKED,
            "max_tokens": TOKENS,
            "api_base": address,
            "api_key": KEY,
        }
        answer: Any = litellm.completion(**given)
        assert answer.choices[0].message.content == expected, provider
        assert answer.usage.completion_tokens == TOKENS and answer.usage.prompt_tokens > 0
        assert (await litellm.acompletion(**given)).choices[0].message.content == expected
        pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**given, stream=True)]
        assert "".join(pieces) == expected, provider
    text: Any = litellm.text_completion(
        model=f"text-completion-openai/{model}",
        prompt=PROMPT,
        max_tokens=1,
        echo=True,
        logprobs=1,
        api_base=URL,
        api_key=KEY,
    )
    assert text.choices[0].text.startswith(PROMPT) and text.choices[0].logprobs.token_logprobs[1] < 0


async def by_agents(model: str) -> None:
    """Agents of pydantic-ai: a text, a stream, and an answer of a class, on two routes."""
    expected = right(model)
    settings: Any = {"max_tokens": TOKENS}
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        agent = Agent(kind(model), model_settings=settings)
        said = await agent.run(PROMPT)
        assert said.output == expected and said.usage.output_tokens == TOKENS, kind
        async with agent.run_stream(PROMPT) as stream:
            assert [text async for text in stream.stream_text()][-1] == expected, kind
        ordering: Any = Agent(kind(model), output_type=Order, model_settings={"max_tokens": 100}, retries=0)
        assert isinstance((await ordering.run(PROMPT)).output, Order), kind


def by_langchain(model: str) -> None:
    """``ChatAnthropic``, as its users call it."""
    expected = right(model)
    chat: Any = ChatAnthropic(model=model, max_tokens=TOKENS)
    assert chat.invoke(PROMPT).content == expected
    assert "".join(str(chunk.text) for chunk in chat.stream(PROMPT)) == expected
    assert (
        chat.get_num_tokens_from_messages([HumanMessage(PROMPT)])
        == chat.invoke(PROMPT).usage_metadata["input_tokens"]
    )
    longer: Any = ChatAnthropic(model=model, max_tokens=100)
    assert isinstance(longer.with_structured_output(Order).invoke(PROMPT), Order)


def main() -> None:
    """All of it, for an adapter and the base."""
    for model in ("base", "alpha"):
        asyncio.run(by_litellm(model))
        asyncio.run(by_agents(model))
        by_langchain(model)


if __name__ == "__main__":
    main()
