"""Calls of tools as families of models write them: recognised by the template, read out of growing text, and
held to by grammars.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_templates import CHAT, SHAPES, TOOL

from adapterpack.chat_templates.template import ChatTemplate
from adapterpack.errors import ConfigError
from adapterpack.runtime.generation.sampling import Sampling
from adapterpack.runtime.generation.structured import grammar_mask
from adapterpack.runtime.text.tokenizer import Tokenizer
from adapterpack.runtime.tools.family import FAMILIES, Call, Tool, ToolFamily, family_of
from adapterpack.runtime.tools.grammar import grammar_of
from adapterpack.runtime.tools.reader import CallReader

FAMILY = {"Llama 3": "llama", "Mistral": "mistral", "Qwen with tools": "hermes"}
ARGUMENTS = '{"town": "Bern", "days": [1, 2]}'
WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "llama": f'{{"name": "weather", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}]',
    "mistral-args": f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}",
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {ARGUMENTS}}}]',
}
SEVERAL = {
    "hermes": "{0}\n{0}",
    "llama": "{0}; {0}",
    "mistral-args": "{0}{0}",
    "mistral": WRITTEN["mistral"][:-1] + ", " + WRITTEN["mistral"].partition("[{")[2].join(("{", "")),
    "granite": WRITTEN["granite"][:-1] + ", " + WRITTEN["granite"].partition("[{")[2].join(("{", "")),
}
WEATHER = Tool("weather", TOOL["function"]["parameters"])  # type: ignore[index]
CLOCK = Tool(
    "clock",
    {
        "type": "object",
        "properties": {"zone": {"$ref": "#/$defs/zone"}},
        "$defs": {"zone": {"enum": ["UTC"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
    strict=True,
)


def several(name: str) -> str:
    """A family's way to write the call twice."""
    return SEVERAL[name] if "{0}" not in SEVERAL[name] else SEVERAL[name].replace("{0}", WRITTEN[name])


def streamed(reader: CallReader, text: str) -> None:
    """Gives a reader a text letter by letter. The pieces that it gives out make up its text and its calls,
    and arguments come as they are written: of each letter of them at most one is kept back.
    """
    text_so_far, calls, kinds = "", list[Call](), ""
    for end in range(1, len(text) + 2):
        for kind, value in reader.read(text[:end], ended=end > len(text)):
            kinds += kind[0]
            match kind:
                case "text":
                    text_so_far += value
                case "name":
                    calls.append(Call(value, ""))
                case "arguments":
                    assert len(value) == 1 or end > len(text)
                    calls[-1] = Call(calls[-1].name, calls[-1].arguments + value)
        assert (text_so_far, calls) == (reader.text, reader.calls)
    assert re.fullmatch("(t*(na+(e|$))*)*", kinds), kinds


@pytest.mark.fast
def test_a_family_is_known_by_its_template() -> None:
    """What the template writes of a call is what the family's reader reads; others are of no known family."""
    assert {
        name: family.name for name, (source, _) in SHAPES.items() if (family := family_of(source))
    } == FAMILY
    for shape, name in FAMILY.items():
        call = {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "weather", "arguments": json.loads(ARGUMENTS)},
        }
        said = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
        text = ChatTemplate(SHAPES[shape][0]).render(
            said, {"tools": [TOOL], "bos_token": "", "eos_token": ""}
        )
        written = WRITTEN[name] if name != "mistral" else WRITTEN[name][:-2]  # it adds an id
        assert written in text
        reader = CallReader(FAMILIES[name], {"weather"})
        reader.read(text[text.index(written) :].split("<|")[0], ended=True)
        assert reader.calls == [Call("weather", ARGUMENTS)]


@pytest.mark.fast
@pytest.mark.parametrize("name", WRITTEN)
def test_calls_are_read_while_the_answer_grows(name: str) -> None:
    """Text before, one call, several, the first alone, one that is cut off, one of an unknown tool, text that
    only begins like one.
    """
    family, call = FAMILIES[name], Call("weather", ARGUMENTS)
    before = "" if name == "llama" else "I look it up. "
    cut, other = (
        before + WRITTEN[name][: WRITTEN[name].index("[1, 2]")],
        before + WRITTEN[name].replace("weather", "whether"),
    )
    plain = 'All of {"a": 1}, <tool, [TOOL and < are plain.  '
    brackets = r'{"town": "\\\"}]{[ \\", "days": [[]]}'
    for text, most, said, calls in (
        (before + WRITTEN[name], None, before.strip(), [call]),
        (several(name), None, "", [call, call]),
        (several(name), 1, "", [call]),
        (cut, None, before.strip(), [Call("weather", ARGUMENTS.partition("[1, 2]")[0])]),
        (WRITTEN[name].removesuffix("l>"), None, "", [call]),
        (other, None, other, []),
        (plain, None, plain, []),
        (WRITTEN[name].replace(ARGUMENTS, brackets), None, "", [Call("weather", brackets)]),
        ("", None, "", []),
        ("{}", None, "{}", []),
    ):
        for read in (lambda reader, text: reader.read(text, ended=True), streamed):
            reader = CallReader(family, {"weather", "clock"}, most)
            read(reader, text)
            assert (reader.text.replace(" ", ""), reader.calls) == (said.replace(" ", ""), calls), text
    if family.named is None:
        reader = CallReader(family, {"weather"})
        reader.read(
            family.marker + json.dumps({family.arguments: json.loads(ARGUMENTS), "name": "weather"}),
            ended=True,
        )
        assert (reader.text, reader.calls) == ("", [call]), "keys in another order"


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


def accepts(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether an answer of that grammar may be this text, and may end there."""
    mask: Any = grammar_mask(tokenizer, Sampling(grammar=grammar))
    for token in tokenizer.encode(text, special=False):
        if not mask.allowed(49_152)[token]:
            return False
        mask.accept(token)
    return bool(mask.finished or mask.allowed(49_152)[2])


@pytest.mark.parametrize("name", [*WRITTEN, "special"])
def test_a_grammar_holds_answers_to_calls(name: str, tokenizer: Tokenizer) -> None:
    """Calls of these tools with arguments that fit and no text besides; several only where they may be; where
    text is free the arguments of strict tools alone are held to. A mark that is a special token is that
    token.
    """
    written, twice = WRITTEN.get(name, WRITTEN["hermes"]), several(name if name in SEVERAL else "hermes")
    family: ToolFamily = FAMILIES[name if name in FAMILIES else "hermes"]
    if name == "special":
        family = dataclasses.replace(family, marker="<|im_start|>")
        written, twice = (text.replace("<tool_call>", "<|im_start|>") for text in (written, twice))
    tools, wrong = (WEATHER, CLOCK), written.replace('"Bern"', "7")
    clock = written.replace("weather", "clock").replace(ARGUMENTS, '{"zone": "UTC"}')

    def grammar(**options: Any) -> str:
        return grammar_of(
            family, tools, **{"free": False, "several": True, **options}, token=tokenizer.special_id
        )

    for text, expected in (
        (written, True),
        (clock, True),
        (twice, True),
        (wrong, False),
        (written[:-2], False),
        ("Hello", False),
        (written.replace("weather", "whether"), False),
        (clock.replace("UTC", "CET"), False),
    ):
        assert accepts(tokenizer, grammar(), text) is expected, text
    assert not accepts(tokenizer, grammar(several=False), twice)
    for text, expected in (
        ("Hello, you", True),
        (written, True),
        (wrong, True),
        (clock, True),
        (clock.replace("UTC", "CET"), False),
    ):
        assert accepts(tokenizer, grammar(free=True), text) is expected, text
    if family.marker:
        form = {
            "type": "object",
            "properties": {"dry": {"type": "boolean"}},
            "required": ["dry"],
            "additionalProperties": False,
        }
        for text, expected in (
            ('{"dry": true}', True),
            ('{"dry": 1}', False),
            ("Hello, you", False),
            (written, True),
            (twice, True),
            (wrong, True),
            (clock, True),
            (clock.replace("UTC", "CET"), False),
            ('{"dry": true}' + written, False),
        ):
            assert accepts(tokenizer, grammar(free=True, form=form), text) is expected, text


def test_what_cannot_be_enforced_is_an_error(tokenizer: Tokenizer) -> None:
    tool = Tool(
        "f",
        {
            "type": "object",
            "properties": {"a": {"type": "string", "contentEncoding": "base64"}, "b": {"not": {}}},
        },
    )
    with pytest.raises(ConfigError):
        grammar_mask(
            tokenizer,
            Sampling(
                grammar=grammar_of(
                    FAMILIES["hermes"], [tool], free=False, several=False, token=tokenizer.special_id
                )
            ),
        )
