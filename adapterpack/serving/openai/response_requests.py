"""Requests of OpenAI's ``/v1/responses``, for text and complete conversations; they are converted to chat
requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from ...io.typed_json import Misfit, StrictStruct
from .requests import (
    ONLY_TEXTS,
    CacheSalt,
    ChatRequest,
    JsonObject,
    JsonSchema,
    Message,
    Mixed,
    PlainText,
    Schema,
)
from .tools import CalledFunction, Function, FunctionName, FunctionTool, InputCall, Name, NamedFunction

_Empty = Annotated[list[Any], Meta(max_length=0)]


class ContentPart(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """A text part of a prompt, or of an earlier answer."""

    type: Annotated[Literal["input_text", "output_text", "text"], Meta(extra=ONLY_TEXTS)]
    text: str
    annotations: _Empty | None = None
    logprobs: _Empty | None = None


class InputItem(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """A message (``role`` and ``content``), a function call (``call_id``, ``name``, ``arguments``), or the
    result of a call (``call_id``, ``output``). Items of a response may be sent back unchanged.
    """

    type: Literal["message", "function_call", "function_call_output"] | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: Annotated[str, Meta(max_length=256)] | None = None
    name: Name | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None
    # without an effect:
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits for a missing part, and for arguments that are no JSON object."""
        needed = {
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }
        for name in needed.get(self.type or "", ("role", "content")):
            if getattr(self, name) is None:
                yield Misfit("", f"{name!r} is missing")
                return
        if self.type == "function_call":
            yield from (
                Misfit(pointer.removeprefix("/function"), what) for pointer, what in self.call.breaches()
            )

    @property
    def call(self) -> InputCall:
        """The item as a call of a chat message."""
        return InputCall(
            self.call_id or "", "function", CalledFunction(self.name or "", self.arguments or "")
        )


class JsonSchemaFormat(
    StrictStruct, frozen=True, tag="json_schema", tag_field="type", forbid_unknown_fields=True
):
    """A text that matches a JSON schema."""

    name: str
    schema_: dict[str, Any] = field(name="schema")
    strict: bool | None = None
    description: str | None = None


class TextConfig(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """The format of the text."""

    format: PlainText | JsonObject | JsonSchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseTool(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """The function that the model must call."""

    type: Literal["function"]
    name: Name


class ResponseStreamOptions(StrictStruct, frozen=True, forbid_unknown_fields=True):
    """Options of a stream, which have no effect."""

    include_obfuscation: bool | None = None


class ResponseRequest(StrictStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/responses``. Nothing is stored, so ``input`` holds the complete conversation."""

    model: str
    adapters: Mixed | None = None
    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    text: TextConfig | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    cache_salt: CacheSalt | None = None
    previous_response_id: str | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    include: _Empty | None = None
    # without an effect:
    stream_options: ResponseStreamOptions | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits for invalid items."""
        for number, item in enumerate(self.input if isinstance(self.input, list) else ()):
            yield from (Misfit(f"/input/{number}{pointer}", what) for pointer, what in item.breaches())

    def chat(self) -> ChatRequest:
        """Converts the request to a chat request."""
        tools = [
            FunctionTool("function", Function(tool.name, tool.description, tool.parameters, tool.strict))
            for tool in self.tools or ()
        ]
        choice = (
            NamedFunction("function", FunctionName(self.tool_choice.name))
            if isinstance(self.tool_choice, NamedTool)
            else self.tool_choice
        )
        given = None if self.text is None else self.text.format
        form = (
            JsonSchema(Schema(given.name, given.schema_, given.strict))
            if isinstance(given, JsonSchemaFormat)
            else given
        )
        return ChatRequest(
            model=self.model,
            adapters=self.adapters,
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            response_format=form,
            tools=tools or None,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            stream=self.stream,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )

    def _messages(self) -> list[Message]:
        """Converts the items to messages. Calls become part of the assistant message before them."""
        messages = [] if self.instructions is None else [Message("system", self.instructions)]
        for item in (
            [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        ):
            if item.type == "function_call":
                last = (
                    messages.pop() if messages and messages[-1].role == "assistant" else Message("assistant")
                )
                messages.append(
                    Message("assistant", last.content, tool_calls=[*(last.tool_calls or ()), item.call])
                )
            elif item.type == "function_call_output":
                messages.append(Message("tool", _text(item.output), tool_call_id=item.call_id))
            else:
                messages.append(
                    Message(
                        "system" if item.role == "developer" else item.role or "user", _text(item.content)
                    )
                )
        return messages


def _text(content: str | list[ContentPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())
