"""The newer routes: Responses, Anthropic's Messages, tokens."""

from __future__ import annotations

from typing import Any

from .calls import ORDER, SCHEMA, Order
from .case import CLAUDE, CLIENT, MODEL, PROMPT, SAID, TOKENS, case, chatted, ids, post, text_of, unread

RESPONSES, MESSAGES, TOKENIZING = "`/v1/responses`", "`/v1/messages`, Anthropic's form", "Tokens"
ASKED: dict[str, Any] = {"model": MODEL, "input": SAID, "max_output_tokens": TOKENS, "temperature": 0}
CALLED: dict[str, Any] = {
    **ASKED,
    "max_output_tokens": 100,
    "tools": [{"type": "function", **ORDER["function"]}],
    "tool_choice": {"type": "function", "name": "order"},
}
TOLD: dict[str, Any] = {
    "model": MODEL,
    "messages": SAID,
    "max_tokens": TOKENS,
    "extra_body": {"temperature": 0},  # a field that the client has left behind
}
WITH_TOOL: dict[str, Any] = {
    **TOLD,
    "max_tokens": 100,
    "tools": [{"name": "order", "input_schema": SCHEMA, "strict": True}],
    "tool_choice": {"type": "tool", "name": "order"},
}


def _chat() -> Any:
    """What the same chat answers by OpenAI's older route."""
    return chatted().choices[0].message.content


@case(RESPONSES)
def response() -> bool:
    """A text, which is the chat's."""
    return CLIENT.responses.create(**ASKED).output_text == _chat()


@case(RESPONSES)
def response_stream() -> bool:
    """A stream, with the events that the client knows."""
    with CLIENT.responses.stream(**ASKED) as stream:
        events = list(stream)
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    return "".join(pieces) == _chat() and events[0].type == "response.created"


@case(RESPONSES)
def response_tools() -> bool:
    """A named tool is called, with arguments that fit."""
    (item,) = CLIENT.responses.create(**CALLED).output
    return item.type == "function_call" and bool(Order.model_validate_json(item.arguments))


@case(RESPONSES)
def response_schema() -> bool:
    """A schema: `responses.parse()` gives the object."""
    answer = CLIENT.responses.parse(**{**ASKED, "max_output_tokens": 100}, text_format=Order)
    return isinstance(answer.output_parsed, Order)


@case(RESPONSES)
def response_stored() -> bool:
    """`previous_response_id` goes on with an earlier response.

    nothing is stored, so the client sends the conversation
    """
    first = CLIENT.responses.create(**ASKED, store=True)
    return bool(CLIENT.responses.create(**ASKED, previous_response_id=first.id).output_text)


@case(MESSAGES)
def message() -> bool:
    """A text, which is the chat's, and its counts."""
    answer = CLAUDE.messages.create(**TOLD)
    (block,) = answer.content
    read = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    return (block.text, answer.stop_reason, answer.usage.output_tokens, read) == (  # type: ignore[union-attr]
        _chat(),
        "max_tokens",
        TOKENS,
        chatted().usage.prompt_tokens,
    )


@case(MESSAGES)
def message_stream() -> bool:
    """A stream, with the events that the client knows."""
    with CLAUDE.messages.stream(**TOLD) as stream:
        said = "".join(stream.text_stream)
        final = stream.get_final_message()
    return said == _chat() and final.usage.output_tokens == TOKENS


@case(MESSAGES)
def message_tools() -> bool:
    """A named tool is called with an input that fits, whole and streamed."""
    (call,) = CLAUDE.messages.create(**WITH_TOOL).content
    with CLAUDE.messages.stream(**WITH_TOOL) as stream:
        (streamed,) = stream.get_final_message().content
    inputs = [Order.model_validate(one.input) for one in (call, streamed)]  # type: ignore[union-attr]
    return inputs[0] == inputs[1] and call.name == "order"  # type: ignore[union-attr]


@case(MESSAGES)
def message_count() -> bool:
    """`/v1/messages/count_tokens`."""
    counted = CLAUDE.messages.count_tokens(model=MODEL, messages=SAID).input_tokens
    return counted == chatted().usage.prompt_tokens


@case(TOKENIZING)
def tokens_and_back() -> bool:
    """`/tokenize` and `/detokenize` of a text."""
    odd = "Größe 🫖"
    return text_of(ids(odd)) == odd and len(ids(PROMPT)) > 5


@case(TOKENIZING)
def tokens_of_messages() -> bool:
    """`/tokenize` of messages, which are the tokens of the chat's prompt."""
    given = post("/tokenize", model=MODEL, messages=SAID).json()
    answer = chatted(extra_body={"return_token_ids": True})
    return given["tokens"] == answer.prompt_token_ids and given["count"] == answer.usage.prompt_tokens


@case(TOKENIZING)
def known_tokens() -> bool:
    """`usage.prompt_tokens_details.cached_tokens`: how much of a prompt was known."""
    new = [{"role": "user", "content": unread()}]
    first, again = (chatted(messages=new).usage for _ in range(2))
    details = [usage.prompt_tokens_details.cached_tokens for usage in (first, again)]
    return details[0] < 32 < details[1] < again.prompt_tokens
