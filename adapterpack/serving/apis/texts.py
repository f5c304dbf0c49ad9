"""Text generation: ``/v1/completions``, ``/v1/chat/completions``, ``/v1/responses`` and ``/v1/messages``, on
every decoder engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from starlette.responses import Response

from ...http import HTTPError, invalid_request
from ...runtime import CallReader, DecoderEngine
from .. import APIS, Api, ApiKind, RequestContext, RouteSpec, ServedModel, json_response
from ..answering import EventStream, TextResponse, running
from ..anthropic.message_requests import MessagesPrompt, MessagesRequest
from ..anthropic.messages_writer import ANTHROPIC, MessageAnswer, MessageEvent, MessagesWriter, TokensCount
from ..observability import Figure
from ..openai import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    ChatWriter,
    Completion,
    CompletionRequest,
    CompletionWriter,
    PreparedRequest,
    Preparer,
    Provenance,
    ResponseAnswer,
    ResponseEvent,
    ResponseRequest,
    ResponsesWriter,
    ResponseWriter,
    Sampled,
    TokenTexts,
)
from ..scheduling import RequestOutput, ScheduledRow
from ..tenants import Key, ServerLimits


class Texts:
    """Answers requests for text on one engine. ``sampling`` names the source of parameters that a request
    leaves out: ``model`` or ``greedy``. With ``share_prefixes`` keys share cached prompt prefixes.
    """

    def __init__(
        self, engine: DecoderEngine, limits: ServerLimits, sampling: str, share_prefixes: bool
    ) -> None:
        self._engine, self._share_prefixes = engine, share_prefixes
        self.preparer = Preparer(engine, limits, sampling)
        self._tokens = TokenTexts(engine.bundle.tokenizer)

    async def chat(self, context: RequestContext) -> Response:
        """``POST /v1/chat/completions``: answers a conversation."""
        return await self._answer(context, await context.read_body(ChatRequest))

    async def completions(self, context: RequestContext) -> Response:
        """``POST /v1/completions``: continues texts."""
        return await self._answer(context, await context.read_body(CompletionRequest))

    async def responses(self, context: RequestContext) -> Response:
        """``POST /v1/responses``: answers a conversation in the form of OpenAI's Responses API."""
        body = await context.read_body(ResponseRequest)
        if body.previous_response_id is not None:
            raise HTTPError(
                400,
                "nothing_stored",
                "no response is stored here: give the whole conversation as input",
                param="previous_response_id",
            )
        return await self._answer(context, body.chat(), partial(ResponsesWriter, body))

    async def messages(self, context: RequestContext) -> Response:
        """``POST /v1/messages``: answers a conversation in the form of Anthropic's Messages API."""
        body = await context.read_body(MessagesRequest)
        return await self._answer(context, body.chat(), partial(MessagesWriter, body))

    async def count(self, context: RequestContext) -> Response:
        """``POST /v1/messages/count_tokens``: counts the tokens of a conversation."""
        body = await context.read_body(MessagesPrompt)
        await context.request_model(body.model)
        return json_response(TokensCount(await self.preparer.count(body.chat())))

    async def _answer(
        self,
        context: RequestContext,
        body: ChatRequest | CompletionRequest,
        form: Callable[[Provenance, Callable[[], CallReader] | None], ResponseWriter] | None = None,
    ) -> Response:
        given = body.prompts if isinstance(body, CompletionRequest) else ()
        asked = body.asked if isinstance(body, ChatRequest) else given
        model = await context.request_model(body.model, body.adapters, asked)
        context.record.stream = bool(body.stream)
        count = body.drawn * (1 if isinstance(body, ChatRequest) else len(body.prompts))
        if count > context.state.limits.rows:
            raise invalid_request(f"a request may have at most {context.state.limits.rows} answers", "n")
        with ExitStack() as stack:
            stack.enter_context(context.state.admission.admit(context.key, count))
            prepared = await self.preparer.prepare(body, context.key.id, model.pack)
            whole = bool(body.return_token_ids) or body.wanted_scores is not None
            output = RequestOutput(count, body.drawn, whole, body.max_tokens == 0)
            rows = self._rows(body, prepared, model, context.key, output)
            stack.enter_context(running(context, rows, sum(map(len, prepared.prompts)), output))
            notes = sorted(context.record.ignored)
            if isinstance(body, ChatRequest):
                unread = self.preparer.unread(body)
                notes += [f"without an effect: this model's chat template reads no {name}" for name in unread]
            provenance = context.state.catalogue.provenance(model, given, notes)
            written = (
                self._form(body, provenance, prepared) if form is None else form(provenance, prepared.calls)
            )
            answer = TextResponse(context, output, model, written)
            if not body.stream:
                return await answer.complete()
            await answer.wait_for_first()
            return EventStream(answer, stack.pop_all())

    def _rows(
        self, body: Sampled, prepared: PreparedRequest, model: ServedModel, key: Key, output: RequestOutput
    ) -> list[ScheduledRow]:
        count = body.drawn
        salt = json.dumps([None if self._share_prefixes else key.id, body.cache_salt])
        row = partial(self._engine.row, cache_salt=salt, prompt_logprobs=body.wanted_scores)
        return [
            ScheduledRow(
                make=partial(row, ids, model.pack, sampling, seen, draw, prepared.mask()),
                pack=model.pack,
                cost=len(ids),
                place=number * count + draw,
                output=output,
                key=key,
                priority=body.priority or 0,
            )
            for number, (ids, sampling, seen) in enumerate(
                zip(prepared.prompts, prepared.samplings, prepared.features, strict=True)
            )
            for draw in range(1 if body.use_beam_search else count)
        ]

    def _form(
        self,
        body: ChatRequest | CompletionRequest,
        provenance: Provenance,
        prepared: PreparedRequest,
    ) -> ResponseWriter:
        if isinstance(body, ChatRequest):
            return ChatWriter(body, provenance, self._tokens, prepared.prompts, prepared.calls)
        echoes = []
        if body.echo:
            decode = self.preparer.text
            echoes = [
                prompt if isinstance(prompt, str) else decode(prompt)
                for prompt in body.prompts
                for _ in range(body.n or 1)
            ]
        return CompletionWriter(body, provenance, self._tokens, prepared.prompts, echoes)


def open_api(
    engine: DecoderEngine, limits: ServerLimits, sampling: str = "model", share_prefixes: bool = False
) -> Api:
    """Makes the API for an engine."""
    texts = Texts(engine, limits, sampling, share_prefixes)
    rows = engine.rows
    chats = engine.bundle.has_tokenizer and engine.bundle.tokenizer.template
    talk = {"messages": [{"role": "user", "content": "Hello"}]} if chats else None
    return Api(
        (
            RouteSpec(
                "POST",
                "/v1/completions",
                texts.completions,
                "key",
                "texts that go on",
                CompletionRequest,
                Completion,
                Completion,
                example=None if talk else {"prompt": "Hello"},
            ),
            RouteSpec(
                "POST",
                "/v1/chat/completions",
                texts.chat,
                "key",
                "the next message of a conversation",
                ChatRequest,
                ChatCompletion,
                ChatChunk,
                example=talk,
            ),
            RouteSpec(
                "POST",
                "/v1/messages",
                texts.messages,
                "key",
                "the next message, in Anthropic's form",
                MessagesRequest,
                MessageAnswer,
                MessageEvent,
                ANTHROPIC,
                talk and {**talk, "max_tokens": 64},
            ),
            RouteSpec(
                "POST",
                "/v1/messages/count_tokens",
                texts.count,
                "key",
                "the tokens of a conversation, in Anthropic's form",
                MessagesPrompt,
                TokensCount,
                None,
                ANTHROPIC,
            ),
            RouteSpec(
                "POST",
                "/v1/responses",
                texts.responses,
                "key",
                "the next message, as a list of items",
                ResponseRequest,
                ResponseAnswer,
                ResponseEvent,
            ),
        ),
        (
            Figure(
                "prompt_tokens_read", "Tokens of prompts that the engine has read.", lambda: rows.prefilled
            ),
            Figure(
                "prompt_tokens_reused",
                "Tokens of prompts that were known from rows before.",
                lambda: rows.reused,
            ),
        ),
        texts.preparer.close,
    )


APIS.register(
    ApiKind(
        "texts", lambda engine: isinstance(engine, DecoderEngine), open_api, ("sampling", "share_prefixes")
    )
)
