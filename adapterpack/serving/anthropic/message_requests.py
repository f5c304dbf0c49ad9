"""Requests of Anthropic's ``/v1/messages``; they are converted to chat requests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta

from ...io import ClosedStruct, Json, Misfit, PositiveWhole, breaches_inside
from ..openai import (
    CacheSalt,
    CalledFunction,
    ChatRequest,
    ClientRequest,
    Function,
    FunctionName,
    FunctionTool,
    ImageUrl,
    InputCall,
    JsonSchema,
    Message,
    MessagePart,
    Mixed,
    Name,
    NamedFunction,
    Priority,
    Schema,
)

_OTHERWISE = {"otherwise": "this server reads texts, images in base64, and calls of tools with their results"}
_OWN_TOOLS = {"otherwise": "this server has no tools of its own"}
_NEEDED = {
    "text": ("text",),
    "image": ("source",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}


class ImageSource(ClosedStruct):
    """An image in base64; no address is fetched."""

    type: Annotated[Literal["base64"], Meta(extra={"otherwise": "no address is fetched"})]
    media_type: Literal["image/png", "image/jpeg"]
    data: str

    @property
    def part(self) -> MessagePart:
        """The image as a part of a chat message."""
        return MessagePart("image_url", None, ImageUrl(f"data:{self.media_type};base64,{self.data}"))


class ContentBlock(ClosedStruct):
    """A block of a message: a text, an image, a call of a tool, or its result. Blocks of thinking come from
    other servers, and are left out.
    """

    type: Annotated[
        Literal["text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking"],
        Meta(extra=_OTHERWISE),
    ]
    text: str | None = None
    source: ImageSource | None = None
    id: Annotated[str, Meta(max_length=256)] | None = None
    name: Name | None = None
    input: Json | None = None
    tool_use_id: Annotated[str, Meta(max_length=256)] | None = None
    content: str | list[ContentBlock] | None = None
    # without an effect:
    is_error: bool | None = None
    cache_control: Json | None = None
    citations: list[Any] | None = None
    caller: Json | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit for a block without its content."""
        for name in _NEEDED.get(self.type, ()):
            if getattr(self, name) is None:
                yield Misfit("", f"{name!r} is missing")
        yield from breaches_inside(self.content, "/content")

    @property
    def call(self) -> InputCall:
        """The block as a call of a chat message."""
        return InputCall(self.id or "", "function", CalledFunction(self.name or "", json.dumps(self.input)))


class InputMessage(ClosedStruct):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits for blocks without content."""
        yield from breaches_inside(self.content, "/content")

    def chat(self) -> Iterator[Message]:
        """Yields it as messages of a chat: each result of a tool is one of its own."""
        if isinstance(self.content, str):
            yield Message(self.role, self.content)
            return
        said = [block for block in self.content if block.type in ("text", "image")]
        results = [block for block in self.content if block.type == "tool_result"]
        for block in results:
            yield Message("tool", _parts(block.content or ""), tool_call_id=block.tool_use_id)
        calls = [block.call for block in self.content if block.type == "tool_use"]
        if said or calls or not results:
            yield Message(self.role, _parts(said), tool_calls=calls or None)


def _parts(content: str | Sequence[ContentBlock]) -> str | list[MessagePart]:
    if isinstance(content, str):
        return content
    if not any(block.source for block in content):
        return "".join(block.text or "" for block in content)
    return [
        MessagePart("text", block.text or "") if block.source is None else block.source.part
        for block in content
    ]


class MessageTool(ClosedStruct):
    """A function that the model may call."""

    name: Name
    input_schema: Json
    description: str | None = None
    type: Annotated[Literal["custom"], Meta(extra=_OWN_TOOLS)] | None = None
    strict: bool | None = None
    cache_control: Json | None = None  # without an effect


class MessageToolChoice(ClosedStruct):
    """Whether the model may, must, or must not call a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(ClosedStruct):
    """Whether the model is to think, for chat templates that read ``enable_thinking``."""

    type: Literal["enabled", "disabled", "adaptive"]
    # without an effect:
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(ClosedStruct):
    """An answer that matches a JSON schema."""

    type: Literal["json_schema"]
    schema: Json


class OutputConfig(ClosedStruct):
    """The form of the answer, and the effort, for chat templates that read ``reasoning_effort``."""

    format: OutputFormat | None = None
    effort: str | None = None


class MessagesPrompt(ClientRequest, kw_only=True):
    """``POST /v1/messages/count_tokens``: a conversation."""

    model: str
    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    system: str | list[ContentBlock] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Json | None = None  # without an effect

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits for invalid messages and tools."""
        yield from breaches_inside(self.messages, "/messages")
        if self.tool_choice is not None and (self.tool_choice.type == "tool") != bool(self.tool_choice.name):
            yield Misfit("/tool_choice/name", "the choice 'tool' has a name, and no other")
        yield from self.chat().breaches()

    def _chat(self, **more: Any) -> ChatRequest:
        """Converts it to a chat request. A last message of the assistant is the beginning of the answer."""
        choice = self.tool_choice
        output = self.output_config or OutputConfig()
        messages = [] if self.system is None else [Message("system", _parts(self.system))]
        for message in self.messages:
            messages += message.chat()
        named = {"auto": "auto", "any": "required", "none": "none"}
        return ChatRequest(
            model=self.model,
            messages=messages,
            tools=[
                FunctionTool(
                    "function", Function(tool.name, tool.description, tool.input_schema, tool.strict)
                )
                for tool in self.tools or ()
            ]
            or None,
            tool_choice=None
            if choice is None
            else NamedFunction("function", FunctionName(choice.name))
            if choice.name
            else named[choice.type],  # type: ignore[arg-type]
            parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
            response_format=None
            if output.format is None
            else JsonSchema(Schema("answer", output.format.schema)),
            reasoning_effort=output.effort,
            chat_template_kwargs=None
            if self.thinking is None
            else {"enable_thinking": self.thinking.type != "disabled"},
            continue_final_message=self.messages[-1].role == "assistant" or None,
            **more,
        )

    def chat(self) -> ChatRequest:
        """Converts it to a chat request."""
        return self._chat()


class MessagesRequest(MessagesPrompt, kw_only=True):
    """``POST /v1/messages``: a conversation to answer."""

    max_tokens: PositiveWhole
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    adapters: Mixed | None = None
    seed: int | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None
    # without an effect:
    metadata: Json | None = None
    service_tier: str | None = None

    def chat(self) -> ChatRequest:
        """Converts it to a chat request."""
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k", "adapters", "seed", "priority")
        given = {name: getattr(self, name) for name in (*same, "cache_salt")}
        return self._chat(**given, stop=self.stop_sequences or None)
