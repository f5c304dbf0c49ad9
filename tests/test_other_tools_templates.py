"""The chat templates and prompts of axolotl and LLaMA-Factory: what is rendered here is what their own code renders
(``tests/interop/tool_renderings.py`` records it).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterpack.chat_templates.template import ChatTemplate
from adapterpack.errors import ConfigError, FormatError
from adapterpack.tasks.conversations.builtin import ALPACA
from adapterpack.tasks.conversations.form import get_form
from adapterpack.tasks.conversations.templates import chat_template, with_defaults
from adapterpack.training.config.config import read_config
from adapterpack.training.config.tools import table_of

pytestmark = pytest.mark.fast

RECORDED = json.loads((Path(__file__).parent / "golden" / "tool_renderings.json").read_text("utf-8"))
TEMPLATES = [
    (f"{tool}/{name}", texts) for tool, some in RECORDED["templates"].items() for name, texts in some.items()
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(template: str, messages: list[dict[str, str]], add: bool = False) -> str:
    return ChatTemplate(template).render(messages, {**TOKENS, "add_generation_prompt": add})


@pytest.mark.parametrize(("name", "texts"), TEMPLATES, ids=[name for name, _ in TEMPLATES])
def test_a_template_renders_what_the_tool_renders(name: str, texts: dict[str, str]) -> None:
    """One turn, two, and two after a system prompt; each prompt is the beginning of the chat with its answer."""
    template = chat_template(name)
    assert texts
    for case, text in texts.items():
        messages = RECORDED["cases"][case]
        assert render(template, messages) == text
        assert text.startswith(render(template, messages[:-1], add=True))


def test_what_a_template_has_no_place_for_is_refused() -> None:
    """Tools, and the answer of a tool, which would otherwise be left out without a word."""
    template = ChatTemplate(chat_template("llamafactory/llama3"))
    asked = [{"role": "user", "content": "a"}]
    for messages, more in (
        (asked, {"tools": [{"name": "f"}]}),
        ([*asked, {"role": "tool", "content": "b"}], {}),
    ):
        with pytest.raises(FormatError, match="no place for"):
            template.render(messages, {**TOKENS, **more})
    with pytest.raises(ConfigError, match="did you mean 'axolotl/chatml'"):
        chat_template("axolotl/chatmll")


def test_variables_have_values_unless_a_request_sets_them() -> None:
    """Of every type that JSON has, whatever stands in a text; what a template renders is no variable."""
    values = {
        "thinks": False,
        "note": 'a "b" %} {{ c }}',
        "depth": 3,
        "nothing": None,
        "list": [1, {"a": None}],
    }
    text = "{{ thinks }}|{{ note }}|{{ depth + 1 }}|{{ nothing is none }}|{{ list[1].a is none }}"
    template = ChatTemplate(with_defaults(text, values))
    assert template.render([], TOKENS) == 'False|a "b" %} {{ c }}|4|True|True'
    assert template.render([], {**TOKENS, "thinks": True, "depth": 0}) == 'True|a "b" %} {{ c }}|1|True|True'
    for name in ("messages", "a b", "x %}"):
        with pytest.raises(ConfigError, match="no variable of a chat template"):
            with_defaults(text, {name: 1})


@pytest.mark.parametrize(("kind", "texts"), RECORDED["prompts"].items(), ids=RECORDED["prompts"])
def test_a_prompt_of_axolotl_is_written_as_axolotl_writes_it(kind: str, texts: list[str]) -> None:
    """Alpaca's prompt in each style, of a row with an input and of one without."""
    form = table_of("axolotl").types[kind].form
    read = get_form(form).read
    rows: list[dict[str, Any]] = [
        {"instruction": "Name it.", "output": "Rose", "input": more} for more in ("It is red.", "")
    ]
    conversations = [read(row) for row in rows]
    assert [one.messages[0]["content"] for one in conversations] == texts
    assert all(one.verbatim and one.messages[1]["content"] == "Rose" for one in conversations)
    assert form != "alpaca-prompt" or ALPACA.prompt(rows[0]) == texts[0]


def test_a_name_of_a_template_is_the_tools_own_or_the_bases() -> None:
    """LLaMA-Factory's ``llama3`` is a template here; of ``qwen3_vl``, which is not, a note says what happens."""
    file = {"model_name_or_path": "b", "dataset": "a.json", "finetuning_type": "lora", "output_dir": "o"}
    (known,), _ = read_config({**file, "template": "llama3"})
    (other,), notes = read_config({**file, "template": "qwen3_vl"})
    assert (known.chat_template, other.chat_template) == ("llamafactory/llama3", "own")
    assert "template qwen3_vl is not known here: the base's own chat template is used" in notes
