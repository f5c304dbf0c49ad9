"""Tokenizes and decodes texts with vLLM's routes ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from ...http import HTTPError, invalid_request
from ...io import ClosedStruct, FrozenStruct, Misfit
from ...runtime import DecoderEngine, Engine, Tokenizer, prompt_ids
from ...runtime.text import MAX_ID
from .. import APIS, Api, ApiKind, RequestContext, RouteSpec, json_response
from ..one_pass.rows import runs_task
from ..one_pass.tensors import OUTPUTS
from ..openai import ChatRequest, FunctionTool, Message
from ..tenants import ServerLimits


class TokenizeRequest(ClosedStruct, kw_only=True):
    """``POST /tokenize``: a text, or a conversation for the chat template, with its tools. A text gets the
    tokenizer's own special tokens.
    """

    model: str
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[FunctionTool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def chat(self, messages: list[Message]) -> ChatRequest:
        """Returns the chat with this prompt."""
        same = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
        return ChatRequest(
            model=self.model, messages=messages, **{name: getattr(self, name) for name in same}
        )

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits if both prompt and messages are given, or none, and for what is no chat."""
        if self.messages is not None:
            yield from self.chat(self.messages).breaches()
        if (self.prompt is None) == (self.messages is None):
            yield Misfit("/prompt", "give prompt or messages")


class Tokens(FrozenStruct):
    """The response of ``/tokenize``."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeRequest(ClosedStruct, kw_only=True):
    """``POST /detokenize``: token ids to decode."""

    model: str
    tokens: list[Annotated[int, Meta(ge=0, le=MAX_ID)]]


class Text(FrozenStruct):
    """The response of ``/detokenize``."""

    prompt: str


async def tokenize(context: RequestContext) -> Response:
    """``POST /tokenize``: returns the tokens of a text or a conversation."""
    body = await context.read_body(TokenizeRequest)
    engine = await _engine(context, body.model)
    ids = await asyncio.to_thread(_ids, engine.bundle.tokenizer, body, context.state.limits)
    name = engine.bundle.tokenizer.core.id_to_token
    words = [name(token) or "" for token in ids] if body.return_token_strs else UNSET
    return json_response(Tokens(len(ids), engine.max_length, ids, words))


async def detokenize(context: RequestContext) -> Response:
    """``POST /detokenize``: returns the text of tokens."""
    body = await context.read_body(DetokenizeRequest)
    bundle = (await _engine(context, body.model)).bundle
    ids = prompt_ids(bundle, body.tokens)
    return json_response(Text(await asyncio.to_thread(bundle.tokenizer.decode, ids, False)))


async def _engine(context: RequestContext, model: str) -> Engine:
    """Returns the engine, once the request has been counted and its model exists."""
    await context.request_model(model)
    return context.state.engine.engine


def _ids(tokenizer: Tokenizer, body: TokenizeRequest, limits: ServerLimits) -> list[int]:
    if body.messages is None:
        return tokenizer.encode(body.prompt or "", special=body.add_special_tokens is not False)
    if tokenizer.template is None:
        what = "this model has no chat template: give a prompt"
        raise HTTPError(400, "no_chat_template", what, param="messages")
    if len(body.messages) > limits.messages:
        raise invalid_request(f"a conversation may have at most {limits.messages} messages", "messages")
    if any(message.images for message in body.messages):
        raise invalid_request("the tokens of images are not counted here", "messages")
    chat = body.chat(body.messages)
    tools = [tool.for_template() for tool in chat.tools or ()]
    return tokenizer.prompt(chat.conversation(), tools, values=chat.template_values)


ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec("POST", "/tokenize", tokenize, "key", "the tokens of a text", TokenizeRequest, Tokens),
    RouteSpec("POST", "/detokenize", detokenize, "key", "the text of tokens", DetokenizeRequest, Text),
)


def _serves(engine: Engine) -> bool:
    return (isinstance(engine, DecoderEngine) or runs_task(engine, *OUTPUTS)) and (
        engine.bundle.folder / "tokenizer.json"
    ).is_file()


APIS.register(ApiKind("tokens", _serves, lambda engine, limits: Api(ROUTES)))
