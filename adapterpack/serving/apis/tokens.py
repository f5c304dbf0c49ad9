"""Tokenizes and decodes texts with vLLM's routes ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from ...http.http_error import HTTPError
from ...io.typed_json import Misfit, StrictStruct
from ...runtime.engine.base import Engine
from ...runtime.engine.engine import DecoderEngine
from ...runtime.open_bundle import OpenBundle
from ...runtime.prompts import prompt_ids
from ...runtime.text.model_files import MAX_ID
from ..api import APIS, Api, ApiKind
from ..one_pass.rows import runs_task
from ..one_pass.tensors import OUTPUTS
from ..openai.requests import Message, breaches_of
from ..route import RouteSpec, json_response
from ..state import RequestContext
from ..tenants.limits import ServerLimits


class TokenizeRequest(StrictStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /tokenize``: a text, or a conversation for the chat template. A text gets the tokenizer's own
    special tokens.
    """

    model: str
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits if both prompt and messages are given, or none, and for invalid messages."""
        yield from breaches_of(self.messages or ())
        if (self.prompt is None) == (self.messages is None):
            yield Misfit("/prompt", "give prompt or messages")


class Tokens(msgspec.Struct, frozen=True):
    """The response of ``/tokenize``."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class DetokenizeRequest(StrictStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /detokenize``: token ids to decode."""

    model: str
    tokens: list[Annotated[int, Meta(ge=0, le=MAX_ID)]]


class Text(msgspec.Struct, frozen=True):
    """The response of ``/detokenize``."""

    prompt: str


class TokenRoutes:
    """Answers with the tokenizer of an engine's bundle."""

    def __init__(self, bundle: OpenBundle, limits: ServerLimits) -> None:
        self._bundle, self._tokenizer, self._limits = bundle, bundle.tokenizer, limits

    async def tokenize(self, context: RequestContext) -> Response:
        """``POST /tokenize``: returns the tokens of a text or a conversation."""
        body = await context.read_body(TokenizeRequest)
        context.state.quotas.ask(context.key)
        context.state.catalogue.find_model(body.model, context.key)
        ids = await asyncio.to_thread(self._ids, body)
        words = (
            [self._tokenizer.core.id_to_token(token) or "" for token in ids]
            if body.return_token_strs
            else UNSET
        )
        return json_response(Tokens(len(ids), context.state.engine.engine.max_length, ids, words))

    async def detokenize(self, context: RequestContext) -> Response:
        """``POST /detokenize``: returns the text of tokens."""
        body = await context.read_body(DetokenizeRequest)
        context.state.quotas.ask(context.key)
        context.state.catalogue.find_model(body.model, context.key)
        return json_response(
            Text(
                await asyncio.to_thread(self._tokenizer.decode, prompt_ids(self._bundle, body.tokens), False)
            )
        )

    def _ids(self, body: TokenizeRequest) -> list[int]:
        if body.messages is None:
            return self._tokenizer.encode(body.prompt or "", special=body.add_special_tokens is not False)
        if self._tokenizer.template is None:
            raise HTTPError(
                400, "no_chat_template", "this model has no chat template: give a prompt", param="messages"
            )
        if len(body.messages) > self._limits.messages:
            raise HTTPError(
                400,
                "invalid_request",
                f"a conversation may have {self._limits.messages} messages",
                param="messages",
            )
        return self._tokenizer.prompt([message.render() for message in body.messages])


def open_api(engine: Engine, limits: ServerLimits) -> Api:
    """Makes the API for an engine."""
    routes = TokenRoutes(engine.bundle, limits)
    return Api(
        (
            RouteSpec(
                "POST", "/tokenize", routes.tokenize, "key", "the tokens of a text", TokenizeRequest, Tokens
            ),
            RouteSpec(
                "POST", "/detokenize", routes.detokenize, "key", "the text of tokens", DetokenizeRequest, Text
            ),
        )
    )


def _serves(engine: Engine) -> bool:
    return (isinstance(engine, DecoderEngine) or runs_task(engine, *OUTPUTS)) and (
        engine.bundle.folder / "tokenizer.json"
    ).is_file()


APIS.register(ApiKind("tokens", _serves, open_api))
