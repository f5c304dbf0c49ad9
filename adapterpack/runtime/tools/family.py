"""Describes how a family of models writes tool calls, and recognizes it by the chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...registry import Registry


class Tool(NamedTuple):
    """A function that a model may call: its name, and the JSON schema of its arguments. If ``strict``, calls
    must match the schema.
    """

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


class Call(NamedTuple):
    """A call of a tool; ``arguments`` is a JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFamily:
    """How calls are written: ``marker``, then JSON with ``name`` and ``arguments`` by that key, then
    ``closing``.

    Attributes:
        recognises: returns whether a chat template belongs to this family.
        marker: the text before a call; empty if any answer that begins with a brace is a call.
        others: further texts that may precede a call.
        opening, closing: the text between the marker and a call, and after a call.
        between: the text between calls.
        listed: a single marker precedes a JSON list of all calls.
        arguments: the key of the arguments.
        named: the text between name and arguments, for families that do not write them as keys of one object.
    """

    name: str
    recognises: Callable[[str], bool]
    marker: str = ""
    others: tuple[str, ...] = ()
    opening: str = ""
    closing: str = ""
    between: str = ""
    listed: bool = False
    arguments: str = "arguments"
    named: str | None = None


FAMILIES = Registry(
    "family of tool calls", ToolFamily, "adapterpack.tool_families", "adapterpack.runtime.tools.families"
)
"""Name -> family."""


def family_of(template: str | None) -> ToolFamily | None:
    """Returns the family whose notation a chat template uses, or None if it is unknown.

    Example:
        >>> family_of("{{ '<tool_call>' + call | tojson + '</tool_call>' }}").name
        'hermes'
    """
    return (
        None
        if template is None
        else next((family for family in FAMILIES.values() if family.recognises(template)), None)
    )
