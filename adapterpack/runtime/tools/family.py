"""A family of models by how they write calls of tools, which the chat template shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...registry import Registry


class Tool(NamedTuple):
    """A function that a model may call: its name, and the JSON schema of its arguments; ``strict``: no call
    may have others.
    """

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


class Call(NamedTuple):
    """A call of a tool; ``arguments`` is JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFamily:
    """How calls are written: ``marker``, then JSON with ``name`` and ``arguments`` by that key, then
    ``closing``.

    Attributes:
        recognises: whether a chat template is one of this family.
        marker: what stands before a call; empty where an answer that begins with a brace is one.
        others: what may stand there besides.
        opening, closing: what stands between the marker and a call, and behind a call.
        between: what stands between calls.
        listed: one marker stands before a JSON list of all calls.
        arguments: the key of the arguments.
        named: what stands between a name and the arguments, where these are no keys of an object.
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


FAMILIES: Registry[ToolFamily] = Registry(
    "family of tool calls", ToolFamily, "adapterpack.tool_families", "adapterpack.runtime.tools.families"
)
"""Name -> the family."""


def family_of(template: str | None) -> ToolFamily | None:
    """The family whose calls a chat template writes, if one is known.

    Example:
        >>> family_of("{{ '<tool_call>' + call | tojson + '</tool_call>' }}").name
        'hermes'
    """
    return (
        None
        if template is None
        else next((family for family in FAMILIES.values() if family.recognises(template)), None)
    )
