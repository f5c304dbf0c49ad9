"""Measures the cost of a chat template by rendering sample conversations in the sandbox: a template that
costs more than its chat exceeds the limits there.
"""

from __future__ import annotations

from collections.abc import Iterable

from jinja2 import nodes as n

from ....chat_templates.template import ChatTemplate
from ....errors import FormatError
from ....io import Json
from ....sandbox.sandbox import OutOfLimits
from .jinja_words import FUNCTIONS

_ARGUMENTS = {"town": "Bern", "days": [1, 2], "units": {"degrees": "C"}}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": _ARGUMENTS}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "required": ["town"],
            "properties": {
                "town": {"type": "string", "description": "Its name."},
                "days": {"type": "array", "items": {"type": "integer"}},
                "units": {
                    "type": "object",
                    "properties": {"degrees": {"type": "string", "enum": ["C", "F"]}},
                },
            },
        },
    },
}
_TURN: list[Json] = [
    {"role": "user", "content": "9999999999 %9999999999d {:9999999999}"},
    {"role": "assistant", "content": "It is dry."},
]
"""Contents that are also a number, and formats with a huge width."""
_CALLED: list[Json] = [
    {"role": "user", "content": "How is the weather?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "dry", "tool_call_id": "call00001", "name": "weather"},
]
_SYSTEM: list[Json] = [{"role": "system", "content": "Be brief."}]
_TOKENS = {name: f"<{name}>" for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
_SAMPLES: tuple[tuple[list[Json], Json], ...] = (
    (_SYSTEM + _TURN * 32, _TOKENS),
    (_TURN * 32, _TOKENS),  # some models have no system message
    (_SYSTEM + (_CALLED + _TURN[1:]) * 16, {**_TOKENS, "tools": [_TOOL] * 2}),
)
"""Long enough that output which doubles with each message exceeds any memory."""


def cost_problem(text: str, nodes: Iterable[n.Node]) -> str | None:
    """Returns which limit the template exceeds when it renders a sample, or None. A template that refuses a
    sample or fails on it is not expensive.
    """
    own, read = {"loop", "messages", "add_generation_prompt", *_TOKENS, *FUNCTIONS}, set[str]()
    for node in nodes:
        if isinstance(node, n.Name | n.Macro):
            (read if isinstance(node, n.Name) and node.ctx == "load" else own).add(node.name)
    others = read - own
    template = ChatTemplate(text)
    for messages, values in _SAMPLES:
        # unknown variables get a value as long as a chat
        unknown = dict.fromkeys(sorted(others - values.keys()), messages)
        # Rendered without and with the unknown variables, because a template may only be expensive in one
        # case.
        for more in ({}, unknown) if unknown else ({},):
            try:
                template.render(messages, {**more, **values})
            except OutOfLimits as error:
                return error.reason
            except FormatError:
                continue
    return None
