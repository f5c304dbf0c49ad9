"""Tools, and answers of a form."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .case import CLIENT, MODEL, SAID, case, chatted, ids, post, text_of

TOOLS, FORMS = "Tools", "Answers of a form"
FREE: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_tokens": 100}


class Order(BaseModel):
    """An order, as an answer or as the arguments of a tool."""

    model_config = ConfigDict(extra="forbid")
    item: Literal["mug", "plate"]
    count: int = Field(ge=1, le=9)


SCHEMA = Order.model_json_schema()
ORDER: Any = {"type": "function", "function": {"name": "order", "parameters": SCHEMA, "strict": True}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": NOTHING, "strict": True}}
NAMED: Any = {"type": "function", "function": {"name": "order"}}


def _called(**more: Any) -> Any:
    """The calls of an answer."""
    return chatted(**{**FREE, "tools": [ORDER, CLOCK], **more}).choices[0].message.tool_calls or []


@case(TOOLS)
def named() -> bool:
    """A named tool is called, with arguments that fit its schema."""
    (call,) = _called(tool_choice=NAMED)
    return call.function.name == "order" and bool(Order.model_validate_json(call.function.arguments))


@case(TOOLS)
def required() -> bool:
    """`required`: some tool is called, and one alone without parallel calls."""
    (call,) = _called(tool_choice="required", parallel_tool_calls=False)
    kinds = {"order": Order.model_validate_json, "clock": json.loads}
    return kinds[call.function.name](call.function.arguments) is not None


@case(TOOLS)
def streamed() -> bool:
    """A streamed call is the whole one, its arguments in pieces."""
    (whole,) = _called(tool_choice=NAMED)
    deltas = [
        call.function
        for chunk in chatted(**FREE, tools=[ORDER], tool_choice=NAMED, stream=True)
        for call in chunk.choices[0].delta.tool_calls or ()
    ]
    pieces = [function.arguments for function in deltas if function.arguments]
    return (
        [one.name for one in deltas if one.name] == ["order"]
        and len(pieces) > 1
        and (
            Order.model_validate_json("".join(pieces)) == Order.model_validate_json(whole.function.arguments)
        )
    )


@case(TOOLS)
def automatic() -> bool:
    """`auto`: what the model writes as a call is one, and its text otherwise."""
    opening = ids("<tool_call>")
    bias = {str(token): 100 - 0.3 * place for place, token in enumerate(opening)}
    (call,) = _called(tools=[CLOCK], tool_choice="auto", logit_bias=bias, frequency_penalty=2, temperature=0)
    plain = chatted(tools=[CLOCK], tool_choice="auto").choices[0].message
    return (call.function.name, json.loads(call.function.arguments)) == ("clock", {}) and (
        plain.tool_calls is None and bool(plain.content)
    )


@case(TOOLS)
def results() -> bool:
    """Calls and their results go into the next prompt."""
    call = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        *SAID,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]
    prompt = text_of(
        post("/tokenize", model=MODEL, messages=messages, tools=[CLOCK]).raise_for_status().json()["tokens"]
    )
    given = chatted(messages=messages, tools=[CLOCK], extra_body={"return_token_ids": True})
    return text_of(given.prompt_token_ids) == prompt and "noon" in prompt and '"parameters"' in prompt


def _written(**more: Any) -> str:
    """A whole answer."""
    choice = chatted(**{**FREE, **more}).choices[0]
    return str(choice.message.content) if choice.finish_reason == "stop" else ""


@case(FORMS)
def by_schema() -> bool:
    """`json_schema`: the answer fits, and is not cut off."""
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}
    return bool(Order.model_validate_json(_written(response_format=form)))


@case(FORMS)
def by_parse() -> bool:
    """`parse()` of OpenAI's client gives the object."""
    answer = CLIENT.chat.completions.parse(model=MODEL, messages=SAID, response_format=Order, **FREE)
    return isinstance(answer.choices[0].message.parsed, Order)


@case(FORMS)
def by_expression() -> bool:
    """`guided_regex`."""
    return bool(re.fullmatch("[0-9]{4}-[a-f]{3}", _written(extra_body={"guided_regex": "[0-9]{4}-[a-f]{3}"})))


@case(FORMS)
def by_choice() -> bool:
    """`guided_choice`."""
    choices = ["yes", 'no "really"', "größe"]
    return _written(extra_body={"guided_choice": choices}) in choices


@case(FORMS)
def by_grammar() -> bool:
    """`guided_grammar`."""
    return _written(extra_body={"guided_grammar": 'start: "a" "b" "b"'}) == "abb"
