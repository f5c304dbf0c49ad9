"""Calls of tools and ``/v1/responses``, as OpenAI's own client makes and hears them, on a model whose
template is Qwen's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from servers import ANN, Served
from test_hostile_requests import RECURSION
from test_templates import SHAPES

from adapterpack import Session, export

TOWNS = {
    "type": "object",
    "properties": {"town": {"$ref": "#/$defs/town"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["town", "days"],
    "additionalProperties": False,
    "$defs": {"town": {"enum": ["Bern", "Faro"]}},
}
WEATHER: dict[str, Any] = {"name": "weather", "description": "of a town", "parameters": TOWNS, "strict": True}
CLOCK: dict[str, Any] = {
    "name": "clock",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS: Any = [{"type": "function", "function": WEATHER}, {"type": "function", "function": CLOCK}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
ASKED: Any = [{"role": "user", "content": "How is the weather?"}]


@pytest.fixture(scope="module")
def calling(model: Path, packs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the other tests, with alpha alone and a template that knows tools."""
    base = tmp_path_factory.mktemp("calling") / "model"
    shutil.copytree(model, base)
    (base / "chat_template.jinja").write_text(SHAPES["Qwen with tools"][0])
    export(base, [packs / "alpha"], base.parent / "bundle", mode="bank", in_place=True)
    return base.parent / "bundle"


@pytest.fixture(scope="module")
def caller(launch: Callable[..., Served], calling: Path) -> Served:
    return launch(calling)


@pytest.fixture(scope="module")
def client(caller: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{caller.address}/v1", api_key=ANN, max_retries=0, timeout=120)


def options(**more: Any) -> dict[str, Any]:
    return {
        "model": "alpha",
        "messages": ASKED,
        "tools": TOOLS,
        "temperature": 1.0,
        "seed": 4,
        "max_tokens": 200,
        **more,
    }


@pytest.mark.long
def test_a_call_has_arguments_that_fit(client: openai.OpenAI) -> None:
    """Required and named calls of a model that knows nothing, whole and streamed, with the client's
    accumulator; one where there may be no more; text where there is to be none. A call and its result go into
    the next prompt.
    """
    named = client.chat.completions.create(**options(tool_choice=NAMED)).choices[0]
    (call,) = named.message.tool_calls or ()
    assert (named.finish_reason, named.message.content, call.function.name) == ("tool_calls", None, "weather")
    jsonschema.validate(json.loads(call.function.arguments), TOWNS)
    required = client.chat.completions.create(
        **options(tool_choice="required", parallel_tool_calls=False, n=4)
    ).choices
    assert all(len(choice.message.tool_calls or ()) == 1 for choice in required)
    for _ in range(5):  # on a crowded machine a chunk may have several tokens
        with client.chat.completions.stream(**options(tool_choice=NAMED)) as stream:
            events = list(stream)
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
        deltas = [
            event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"
        ]
        assert "".join(deltas) == call.function.arguments
        if len(deltas) > 3:
            break
    assert len(deltas) > 3, "as they are written"
    assert "tool_calls.function.arguments.done" in {event.type for event in events}
    assert (streamed.function.name, streamed.function.arguments) == (
        call.function.name,
        call.function.arguments,
    )
    heads = [
        call
        for chunk in client.chat.completions.create(**options(tool_choice=NAMED), stream=True)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or ()
        if call.id or call.type or (call.function and call.function.name)
    ]
    assert [
        (head.index, bool(head.id), head.type, head.function.name, head.function.arguments)
        for head in heads
        if head.function
    ] == [(0, True, "function", "weather", "")], "the first chunk of a call alone has its id and name"
    cut = client.chat.completions.create(**options(tool_choice=NAMED, max_tokens=22)).choices[0]
    (half,) = cut.message.tool_calls or ()
    assert cut.finish_reason == "length" and call.function.arguments.startswith(half.function.arguments)
    plain = client.chat.completions.create(**options(tool_choice="none", max_tokens=5)).choices[0]
    without = client.chat.completions.create(**{**options(max_tokens=5), "tools": openai.NOT_GIVEN}).choices[
        0
    ]
    assert plain.message.content == without.message.content and plain.message.tool_calls is None
    free = client.chat.completions.create(**options(max_tokens=5)).choices[0]
    assert free.message.content and free.finish_reason == "length"


@pytest.mark.long
def test_a_call_or_a_form(client: openai.OpenAI) -> None:
    """With tools and a schema an answer is a call of one of them or JSON that fits; where it has to be a call
    the schema has no say.
    """
    form: Any = {
        "type": "json_schema",
        "json_schema": {
            "name": "sky",
            "schema": {
                "type": "object",
                "properties": {"sky": {"enum": ["blue", "grey"]}},
                "required": ["sky"],
                "additionalProperties": False,
            },
        },
    }
    choices = client.chat.completions.create(**options(tools=TOOLS[:1], response_format=form, n=8)).choices
    for choice in choices:
        if choice.message.tool_calls:
            assert choice.message.content is None and choice.finish_reason == "tool_calls"
        else:
            assert json.loads(choice.message.content or "")["sky"] in ("blue", "grey")
    assert any(choice.message.content for choice in choices)
    named = (
        client.chat.completions.create(**options(response_format=form, tool_choice=NAMED)).choices[0].message
    )
    assert [call.function.name for call in named.tool_calls or ()] == ["weather"]


@pytest.mark.long
def test_what_was_called_is_in_the_prompt(client: openai.OpenAI, caller: Served, calling: Path) -> None:
    """Tools, calls and results are rendered as the template has them: as many tokens as the session's."""
    tokenizer = Session(calling, "cpu").tokenizer
    answer = (
        client.chat.completions.create(**options(tool_choice=NAMED, parallel_tool_calls=True))
        .choices[0]
        .message
    )
    (call,) = answer.tool_calls or ()
    messages = [*ASKED, answer, {"role": "tool", "tool_call_id": call.id, "content": "dry"}]
    usage = client.chat.completions.create(**options(messages=messages, max_tokens=1)).usage
    function = {"name": "weather", "arguments": json.loads(call.function.arguments)}
    rendered = tokenizer.render(
        [
            *ASKED,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": call.id, "type": "function", "function": function}],
            },
            {"role": "tool", "content": "dry", "tool_call_id": call.id, "name": "weather"},
        ],
        [
            {
                "type": "function",
                "function": {
                    "name": one["name"],
                    "description": one.get("description", ""),
                    "parameters": one["parameters"],
                },
            }
            for one in (WEATHER, CLOCK)
        ],
    )
    assert "<tools>" in rendered and "<tool_call>" in rendered and "<tool_response>" in rendered
    expected = tokenizer.encode(rendered, special=False)
    assert usage is not None and usage.prompt_tokens == len(expected)
    sent = [
        message if isinstance(message, dict) else message.model_dump(exclude_none=True)
        for message in messages
    ]
    told = caller.post("/tokenize", {"model": "alpha", "messages": sent, "tools": TOOLS}).json()
    assert told["tokens"] == expected
    again = client.responses.create(
        model="alpha",
        temperature=1.0,
        max_output_tokens=1,
        tools=[{"type": "function", **WEATHER}, {"type": "function", "strict": None, **CLOCK}],
        input=[
            *ASKED,
            {
                "type": "function_call",
                "call_id": call.id,
                "name": "weather",
                "arguments": call.function.arguments,
            },
            {"type": "function_call_output", "call_id": call.id, "output": "dry"},
        ],
    )
    assert again.usage is not None and again.usage.input_tokens == usage.prompt_tokens


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": openai.NOT_GIVEN, "tool_choice": "required"}, "tool_choice"),
    ({"extra_body": {"guided_regex": "a+"}}, "tools"),
    (
        {
            "tools": [
                {"type": "function", "function": {**CLOCK, "parameters": {"type": "object", "not": {}}}}
            ],
            "tool_choice": "required",
        },
        "tools",
    ),
    ({"tools": TOOLS * 100}, "tools"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object", "not": {}}},
            }
        },
        "response_format",
    ),
    (
        {
            "tools": [{"type": "function", "function": {**CLOCK, "parameters": RECURSION}}],
            "tool_choice": "required",
        },
        "tools",
    ),
    (
        {
            "messages": [
                *ASKED,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "a", "type": "function", "function": {"name": "clock", "arguments": "[]"}}
                    ],
                },
            ]
        },
        "messages.1.tool_calls.0.function.arguments",
    ),
)


@pytest.mark.long
def test_what_cannot_be_called_is_refused(client: openai.OpenAI, server: Served) -> None:
    """With the field at fault; a model whose template has no known calls takes no tools, but may be told to
    use none.
    """
    for more, param in REFUSED:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**options(**more))
        assert caught.value.param == param, more
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=ANN, max_retries=0, timeout=120) as other:
        with pytest.raises(openai.BadRequestError) as caught:
            other.chat.completions.create(**options())
        assert caught.value.code == "no_tool_format"
        assert other.chat.completions.create(**options(tool_choice="none", max_tokens=1)).choices


@pytest.mark.long
def test_responses(client: openai.OpenAI, caller: Served) -> None:
    """Text, a form, and calls equal those of a chat, whole and by the client's stream; what came back goes in
    again; nothing is stored.
    """
    common: dict[str, Any] = {"model": "alpha", "temperature": 1.0, "extra_body": {"seed": 4}}
    chat = client.chat.completions.create(
        model="alpha",
        temperature=1.0,
        seed=4,
        max_tokens=8,
        messages=[{"role": "system", "content": "Be brief."}, *ASKED],
    ).choices[0]
    whole = client.responses.create(
        **common, instructions="Be brief.", input="How is the weather?", max_output_tokens=8
    )
    assert (whole.output_text, whole.status) == (chat.message.content, "incomplete")
    assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.adapterpack["digest"] == caller.adapters["alpha"]  # type: ignore[attr-defined]
    with client.responses.stream(
        **common, instructions="Be brief.", input=ASKED, max_output_tokens=8
    ) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta")
        == whole.output_text
    )
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.incomplete" and events[-1].response.usage == whole.usage
    tools: Any = [{"type": "function", **WEATHER}]
    called = client.responses.create(
        **common, input=ASKED, tools=tools, tool_choice={"type": "function", "name": "weather"}
    )
    (item,) = called.output
    assert (item.type, called.status) == ("function_call", "completed")
    jsonschema.validate(json.loads(item.arguments), TOWNS)
    with client.responses.stream(
        **common, input=ASKED, tools=tools, tool_choice="required", parallel_tool_calls=False
    ) as stream:
        types = [event.type for event in stream]
        (streamed,) = stream.get_final_response().output
    assert (
        types[-2:] == ["response.output_item.done", "response.completed"]
        and "response.function_call_arguments.done" in types
    )
    assert streamed.type == "function_call"
    form: Any = {"format": {"type": "json_schema", "name": "towns", "schema": TOWNS, "strict": True}}
    jsonschema.validate(
        json.loads(client.responses.create(**common, input="Where?", text=form).output_text), TOWNS
    )
    back = [
        *ASKED,
        *whole.output,
        *called.output,
        {"type": "function_call_output", "call_id": item.call_id, "output": "dry"},
    ]
    assert client.responses.create(**common, input=back, max_output_tokens=2).output_text
    assert called.usage is not None
    cut = called.usage.output_tokens * 7 // 10
    with client.responses.stream(
        **common,
        input=ASKED,
        tools=tools,
        tool_choice={"type": "function", "name": "weather"},
        max_output_tokens=cut,
    ) as stream:
        *_, end = stream
    (half,) = end.response.output  # type: ignore[union-attr]
    assert (half.type, half.status) == ("function_call", "incomplete")
    for more, code in (
        ({"previous_response_id": "resp-1"}, "nothing_stored"),
        ({"background": True}, "invalid_request"),
        ({"tools": [{"type": "web_search"}]}, "invalid_request"),
        ({"input": [{"role": "user"}]}, "invalid_request"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**{"model": "alpha", "input": "x", **more})
        assert caught.value.code == code, more
    assert client.responses.create(model="alpha", input="x", store=True, max_output_tokens=1).store is False  # type: ignore[attr-defined]
