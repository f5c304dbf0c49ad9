"""The tools of a request and the calls in its messages, in OpenAI's form, and their conversion to a model
family's notation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from ...errors import FormatError
from ...http import HTTPError, invalid_request
from ...io import ClosedStruct, Json, Misfit, strict_json
from ...runtime import CallReader
from ...runtime.tools.family import Tool, ToolFamily
from ...runtime.tools.grammar import grammar_of
from ..tenants import ServerLimits

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}\Z")]
_DEPTH = 64
_ARGUMENTS = 1 << 20


class Function(ClosedStruct):
    """A function that the model may call. ``parameters`` is the JSON schema of its arguments, which
    ``strict`` enforces.
    """

    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class FunctionTool(ClosedStruct):
    """A tool; the only supported kind is a function."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> Json:
        """Returns the tool in the form that chat templates take."""
        function = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": self.function.parameters or {"type": "object", "properties": {}},
        }
        return {"type": "function", "function": function}


class FunctionName(ClosedStruct):
    """The name of a function."""

    name: Name


class NamedFunction(ClosedStruct):
    """The function that the model must call."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedFunction


class CalledFunction(ClosedStruct):
    """A function call; ``arguments`` is a JSON object as text."""

    name: Name
    arguments: str


class InputCall(ClosedStruct):
    """A call in an assistant message. ``index`` may remain from a stream, and is ignored."""

    id: Annotated[str, Meta(max_length=256)]
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit if the arguments are no JSON object."""
        try:
            value = strict_json.loads(self.function.arguments.encode(), None, _ARGUMENTS, 1 << 64, _DEPTH)
        except FormatError as error:
            yield Misfit("/function/arguments", error.sentence)
        else:
            if not isinstance(value, dict):
                yield Misfit("/function/arguments", "the arguments of a call are a JSON object")

    def for_template(self) -> Json:
        """Returns the call in the form that chat templates take, with its arguments as a mapping."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ToolUse:
    """The tools that an answer may call, or with ``must`` has to call; with ``one`` at most one call."""

    family: ToolFamily
    tools: tuple[Tool, ...]
    must: bool
    one: bool

    def reader(self) -> CallReader:
        """Makes the reader of calls for one answer."""
        return CallReader(self.family, {tool.name for tool in self.tools}, 1 if self.one else None)

    def parameters(self, token: Callable[[str], int | None], form: Mapping[str, Any] | None) -> Json:
        """Returns the sampling parameters that enforce it. ``token`` returns the id of a special token. An
        answer without a call matches the schema ``form``, if there is one.

        Raises:
            HTTPError: this model writes calls as plain JSON, which cannot be told from JSON of the form.
        """
        if form is not None and not self.must and not self.family.marker:
            raise invalid_request(
                "this model writes calls as plain JSON, which nothing tells from JSON of another form: "
                "leave out the form, or the tools",
                "tools",
            )
        given: Json = {"skip_special_tokens": False}  # the marks of calls may be special tokens
        if self.must or form is not None or any(tool.strict for tool in self.tools):
            given["grammar"] = grammar_of(
                self.family, self.tools, free=not self.must, several=not self.one, token=token, form=form
            )
        elif self.one and self.family.closing:
            given["stop"] = (self.family.closing.strip(),)
        return given


def tool_use(
    tools: Sequence[FunctionTool] | None,
    choice: ToolChoice | None,
    parallel: bool | None,
    family: ToolFamily | None,
    limits: ServerLimits,
) -> ToolUse | None:
    """Interprets the tool fields of a request for a model family; returns None if the model may call nothing.

    Raises:
        HTTPError: there are too many tools, two have one name, the chosen one does not exist, or the model's
            notation of calls is unknown.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid_request("there are no tools to choose from", "tool_choice")
        return None
    if len(tools) > limits.tools:
        raise invalid_request(f"a request may have at most {limits.tools} tools", "tools")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise invalid_request("two tools have one name", "tools")
    if choice == "none":
        return None
    if family is None:
        raise HTTPError(
            400,
            "no_tool_format",
            "this model's notation of tool calls is not known: its chat template is of no known family",
            param="tools",
        )
    chosen = [choice.function.name] if isinstance(choice, NamedFunction) else names
    if not set(chosen) <= set(names):
        raise invalid_request(f"there is no tool {chosen[0]!r}", "tool_choice")
    usable = tuple(
        Tool(tool.function.name, tool.function.parameters or {}, bool(tool.function.strict))
        for tool in tools
        if tool.function.name in chosen
    )
    must = choice not in (None, "auto")
    return ToolUse(family, usable, must, parallel is False or isinstance(choice, NamedFunction))
