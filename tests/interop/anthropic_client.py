"""Anthropic's own client against a server of texts: whole, streamed, asynchronous, with tools, stop
texts, the beginning of an answer, and counts. What it hears is what OpenAI's client hears.

``with_servers.py`` starts the server, and ``.ci/client-libraries`` the environment in which this runs: it has
no adapterpack.
"""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import openai

PROMPT, TOKENS = "Order two mugs for Lisbon", 12
ASKED: Any = [{"role": "user", "content": PROMPT}]
TOOL: Any = {
    "name": "order",
    "description": "Orders something.",
    "strict": True,
    "input_schema": {
        "type": "object",
        "properties": {
            "item": {"enum": ["mug", "plate"]},
            "count": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["item", "count"],
        "additionalProperties": False,
    },
}


def right(model: str, messages: Any = ASKED, **more: Any) -> Any:
    """What OpenAI's own client hears."""
    return openai.OpenAI().chat.completions.create(model=model, messages=messages, max_tokens=TOKENS, **more)


def texts(client: anthropic.Anthropic, model: str) -> str:
    """Texts: whole and streamed, with counts and reasons."""
    expected = right(model)
    answer = client.messages.create(model=model, messages=ASKED, max_tokens=TOKENS)
    (block,) = answer.content
    assert block.type == "text" and block.text == expected.choices[0].message.content
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", TOKENS)
    read = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert read == expected.usage.prompt_tokens
    assert client.messages.count_tokens(model=model, messages=ASKED).input_tokens == read
    with client.messages.stream(model=model, messages=ASKED, max_tokens=TOKENS) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", TOKENS)
    kinds = [
        event.type
        for event in client.messages.create(model=model, messages=ASKED, max_tokens=TOKENS, stream=True)
    ]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    stop = block.text[3:6]
    cut = client.messages.create(model=model, messages=ASKED, max_tokens=TOKENS, stop_sequences=[stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].text == block.text.partition(stop)[0]  # type: ignore[union-attr]
    return block.text


def conversations(client: anthropic.Anthropic, model: str) -> None:
    """A system's text, blocks, and the beginning of an answer."""
    system = [{"type": "text", "text": "You sell mugs.", "cache_control": {"type": "ephemeral"}}]
    blocks = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    answer = client.messages.create(
        model=model,
        system=system,
        messages=blocks,
        max_tokens=TOKENS,
        metadata={"user_id": "ann"},  # type: ignore[arg-type]
    )
    expected = right(model, [{"role": "system", "content": "You sell mugs."}, *ASKED])
    assert answer.content[0].text == expected.choices[0].message.content  # type: ignore[union-attr]
    begun = [*ASKED, {"role": "assistant", "content": "Two mugs"}]
    going = client.messages.create(model=model, messages=begun, max_tokens=TOKENS)
    expected = right(model, begun, extra_body={"continue_final_message": True})
    assert going.content[0].text == expected.choices[0].message.content  # type: ignore[union-attr]


def tools(client: anthropic.Anthropic, model: str) -> None:
    """A call that is asked for, whole and streamed, and its result."""
    given: Any = {
        "model": model,
        "messages": ASKED,
        "max_tokens": 100,
        "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "order"},
    }
    answer = client.messages.create(**given)
    (call,) = answer.content
    assert (answer.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "order")
    assert call.input["item"] in ("mug", "plate") and call.id.startswith("toolu_")
    with client.messages.stream(**given) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (streamed,) = stream.get_final_message().content
    assert streamed.input == call.input and len(pieces) > 1
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "done"}]}
    after = [
        *ASKED,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    told = client.messages.create(model=model, messages=after, max_tokens=TOKENS, tools=[TOOL])
    assert told.usage.output_tokens == TOKENS


async def later(model: str) -> None:
    """The client that does not wait."""
    async with anthropic.AsyncAnthropic() as client:
        answers = await asyncio.gather(
            *(client.messages.create(model=model, messages=ASKED, max_tokens=TOKENS) for _ in range(4))
        )
    assert {answer.content[0].text for answer in answers} == {right(model).choices[0].message.content}  # type: ignore[union-attr]


def main() -> None:
    """All of it, for two adapters and the base."""
    client = anthropic.Anthropic(max_retries=0)
    assert len({texts(client, model) for model in ("base", "alpha", "beta")}) == 3
    conversations(client, "alpha")
    asyncio.run(later("alpha"))
    tools(client, "alpha")


if __name__ == "__main__":
    main()
