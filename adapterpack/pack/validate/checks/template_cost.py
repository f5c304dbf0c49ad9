"""Measures the cost of a chat template by rendering sample conversations in the sandbox: a template that
costs more than its chat exceeds the limits there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from jinja2 import nodes as n

from ....chat_templates.template import ChatTemplate
from ....errors import FormatError
from ....io import Json
from ....sandbox.sandbox import OutOfLimits
from .jinja_words import FUNCTIONS

_CHAT = json.loads((Path(__file__).parent / "sample_chat.json").read_text("utf-8"))
_SYSTEM, _TURN, _CALLED = (_CHAT[name] for name in ("system", "turn", "called"))
"""Messages; the contents of a turn are also a number, and formats with a huge width."""
_TOKENS = {name: f"<{name}>" for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
_SAMPLES: tuple[tuple[list[Json], Json], ...] = (
    (_SYSTEM + _TURN * 32, _TOKENS),
    (_TURN * 32, _TOKENS),  # some models have no system message
    (_SYSTEM + (_CALLED + _TURN[1:]) * 16, {**_TOKENS, "tools": [_CHAT["tool"]] * 2}),
)
"""Long enough that output which doubles with each message exceeds any memory."""


def cost_problem(text: str, nodes: Iterable[n.Node]) -> str | None:
    """Returns which limit the template exceeds when it renders a sample, or None. A template that refuses a
    sample or fails on it is not expensive.
    """
    own = {"loop", "messages", "add_generation_prompt", *_TOKENS, *FUNCTIONS}
    read = set[str]()
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
