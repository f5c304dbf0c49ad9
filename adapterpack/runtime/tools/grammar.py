"""Constrains an answer to tool calls in the notation of a family: builds a grammar in llguidance's dialect of
Lark.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..generation import DEFAULTS
from .family import Tool, ToolFamily

_ANYTHING = {"type": "object"}


def grammar_of(
    family: ToolFamily,
    tools: Sequence[Tool],
    *,
    free: bool,
    several: bool,
    token: Callable[[str], int | None],
    form: Mapping[str, Any] | None = None,
) -> str:
    """Returns the grammar of answers that call one of these tools, or with ``several`` any number of them,
    with arguments that match their schemas.

    With ``free`` an answer may also be text without a call, or with a ``form`` JSON that matches this schema;
    then only ``strict`` tools constrain their arguments. Only families with a marker can have a form, since
    the marker tells calls from that JSON. ``token`` returns the id of a special token, which has no text, or
    None.
    """

    def text(written: str) -> str:
        special = token(written)
        return f"<[{special}]>" if special is not None else json.dumps(written) if written else ""

    if family.named is None:
        bodies = [
            f"{text(json.dumps({'name': tool.name})[:-1] + f', {json.dumps(family.arguments)}: ')} "
            f'args_{number} "}}"'
            for number, tool in enumerate(tools)
        ]
    else:
        bodies = [
            f"{text(tool.name)} {text(family.named)} args_{number}" for number, tool in enumerate(tools)
        ]
    call = f"{text(family.opening)} body {text(family.closing)}"
    begin, between = text(family.marker), text(family.between)
    if family.listed:
        calls = f'{text(family.opening)} "[" body {f"({between} body)*" if several else ""} "]"'
    else:
        calls = f"{call} {f'({between} {begin} {call})*' if several else ''}"
    if not free:
        start = [f"start: {begin} {calls}"]
    elif form is not None:
        start = [f"start: form | {begin} {calls}", f"form: %json {json.dumps(_held_to(form))}"]
    elif not family.marker:
        start = [f"start: {calls} | OTHER", r"OTHER: /[^{](.|\n)*/"]
    elif token(family.marker) is not None:
        start = [f"start: TEXT | TEXT {begin} {calls}", r"TEXT: /(.|\n)*/"]
    else:
        start = [f"start: TEXT | begin {calls}", f"begin[lazy]: TEXT {begin}", r"TEXT: /(.|\n)*/"]
    schemas = [_ANYTHING if free and not tool.strict else tool.parameters or _ANYTHING for tool in tools]
    rules = [f"args_{number}: %json {json.dumps(_held_to(schema))}" for number, schema in enumerate(schemas)]
    return "\n".join(["%llguidance {}", *start, f"body: {' | '.join(bodies)}", *rules])


def _held_to(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a schema with our JSON notation as default; the schema may override it, but an unenforceable
    keyword is always an error.
    """
    guidance = schema.get("x-guidance")
    return {
        **schema,
        "x-guidance": {**DEFAULTS, **(guidance if isinstance(guidance, dict) else {}), "lenient": False},
    }
