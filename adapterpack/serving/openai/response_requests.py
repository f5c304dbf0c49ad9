"""Requests of OpenAI's ``/v1/responses``, for text and complete conversations; they are converted to chat
requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from ...io import ClosedStruct, Misfit, PositiveWhole, breaches_inside
from .requests import (
    CONTENT,
    ChatRequest,
    ImageUrl,
    JsonObject,
    JsonSchema,
    Message,
    MessagePart,
    PlainText,
    Schema,
    TextRequest,
)
from .tools import CalledFunction, Function, FunctionName, FunctionTool, InputCall, Name, NamedFunction

_Empty = Annotated[list[Any], Meta(max_length=0)]


class ContentPart(ClosedStruct):
    """A text part of a prompt, or of an earlier answer; or an image of a prompt, as a data URL."""

    type: Annotated[Literal["input_text", "output_text", "text", "input_image"], Meta(extra=CONTENT)]
    text: str | None = None
    image_url: str | None = None
    detail: Literal["auto", "low", "high"] | None = None
    annotations: _Empty | None = None
    logprobs: _Empty | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit for a part without its content, or an image elsewhere than in a data URL."""
        name = "image_url" if self.type == "input_image" else "text"
        if getattr(self, name) is None:
            yield Misfit("", f"{name!r} is missing")
        elif self.image_url is not None:
            yield from (Misfit("/image_url", what) for _, what in ImageUrl(self.image_url).breaches())


class InputItem(ClosedStruct):
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
        yield from breaches_inside(self.content, "/content")
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


class JsonSchemaFormat(Schema, kw_only=True, tag="json_schema", tag_field="type"):
    """A text that matches a JSON schema."""

    schema_: dict[str, Any] = field(name="schema")


class TextConfig(ClosedStruct):
    """The format of the text."""

    format: PlainText | JsonObject | JsonSchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseTool(Function, kw_only=True):
    """A function that the model may call."""

    type: Literal["function"]


class NamedTool(FunctionName, kw_only=True):
    """The function that the model must call."""

    type: Literal["function"]


class ResponseStreamOptions(ClosedStruct):
    """Options of a stream, which have no effect."""

    include_obfuscation: bool | None = None


class Reasoning(ClosedStruct):
    """How long the model is to think, for chat templates that read ``reasoning_effort``."""

    effort: str | None = None
    # without an effect:
    summary: str | None = None
    generate_summary: str | None = None


class ResponseRequest(TextRequest, kw_only=True):
    """``POST /v1/responses``. Nothing is stored, so ``input`` holds the complete conversation."""

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: PositiveWhole | None = None
    text: TextConfig | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None  # answers have none
    stream_options: ResponseStreamOptions | None = None  # without an effect

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits for invalid items."""
        yield from breaches_inside(self.input, "/input")

    def chat(self) -> ChatRequest:
        """Converts the request to a chat request."""
        choice = self.tool_choice
        form = None if self.text is None else self.text.format
        return ChatRequest(
            **{name: getattr(self, name) for name in TextRequest.__struct_fields__},
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            response_format=JsonSchema(form) if isinstance(form, JsonSchemaFormat) else form,
            tools=[FunctionTool("function", tool) for tool in self.tools or ()] or None,
            tool_choice=NamedFunction("function", choice) if isinstance(choice, NamedTool) else choice,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
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
                        "system" if item.role == "developer" else item.role or "user", _parts(item.content)
                    )
                )
        return messages


def _text(content: str | list[ContentPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text or "" for part in content or ())


def _parts(content: str | list[ContentPart] | None) -> str | list[MessagePart]:
    if isinstance(content, str) or all(part.image_url is None for part in content or ()):
        return _text(content)
    return [
        MessagePart("text", part.text or "")
        if part.image_url is None
        else MessagePart("image_url", None, ImageUrl(part.image_url))
        for part in content or ()
    ]
