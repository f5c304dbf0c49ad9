"""Texts, token by token: ``/v1/completions`` and ``/v1/chat/completions``, of every engine that decodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from ...http.http_error import HTTPError
from ...runtime.engine.base import Engine
from ...runtime.engine.engine import DecoderEngine
from ...runtime.tools.reader import CallReader
from .. import parsing
from ..answering import EventStream, TextResponse, running
from ..api import APIS, Api, ApiKind
from ..catalogue import ServedModel
from ..observability.audit import Record
from ..observability.metrics import Figure
from ..openai.answers import ChatChunk, ChatCompletion, Completion, Provenance
from ..openai.prepare import PreparedRequest, Preparer, copy_mask
from ..openai.requests import ChatRequest, CompletionRequest, Sampled
from ..openai.response_answers import ResponseAnswer, ResponseEvent
from ..openai.response_requests import ResponseRequest
from ..openai.response_writer import ChatWriter, CompletionWriter, ResponseWriter
from ..openai.responses_writer import ResponsesWriter
from ..openai.token_texts import TokenTexts
from ..route import RouteSpec
from ..scheduling.rows import RequestOutput, ScheduledRow
from ..state import State
from ..tenants.keys import Key
from ..tenants.limits import ServerLimits


class Texts:
    """Answers requests for text on one engine; what they leave out of the sampling parameters is by the rule
    ``sampling``. With ``share_prefixes`` keys find what was read of others' prompts.
    """

    def __init__(
        self, engine: DecoderEngine, limits: ServerLimits, sampling: str, share_prefixes: bool
    ) -> None:
        self._share_prefixes = share_prefixes
        self._engine, self.preparer, self._tokens = (
            engine,
            Preparer(engine, limits, sampling),
            TokenTexts(engine.bundle.tokenizer),
        )

    async def chat(self, state: State, request: Request, key: Key, record: Record) -> Response:
        """``POST /v1/chat/completions``."""
        return await self._answer(
            state, request, key, record, await parsing.body(request, ChatRequest, state.limits)
        )

    async def completions(self, state: State, request: Request, key: Key, record: Record) -> Response:
        """``POST /v1/completions``."""
        return await self._answer(
            state, request, key, record, await parsing.body(request, CompletionRequest, state.limits)
        )

    async def responses(self, state: State, request: Request, key: Key, record: Record) -> Response:
        """``POST /v1/responses``."""
        body = await parsing.body(request, ResponseRequest, state.limits)
        if body.previous_response_id is not None:
            raise HTTPError(
                400,
                "nothing_stored",
                "no response is stored here: give the whole conversation as input",
                param="previous_response_id",
            )
        return await self._answer(state, request, key, record, body.chat(), partial(ResponsesWriter, body))

    async def _answer(
        self,
        state: State,
        request: Request,
        key: Key,
        record: Record,
        body: ChatRequest | CompletionRequest,
        form: Callable[[Provenance, Callable[[], CallReader] | None], ResponseWriter] | None = None,
    ) -> Response:
        state.quotas.ask(key)
        model = state.catalogue.request_model(body.model, body.adapters, key)
        record.answers(model.adapter, model.digest, model.mixed)
        record.stream = bool(body.stream)
        count = (body.n or 1) * (1 if isinstance(body, ChatRequest) else len(body.prompts))
        if count > state.limits.rows:
            raise HTTPError(
                400, "invalid_request", f"a request may have {state.limits.rows} answers", param="n"
            )
        with ExitStack() as stack:
            stack.enter_context(state.admission.admit(key, count))
            prepared = await self.preparer.prepare(body, key.id)
            output = RequestOutput(count)
            rows = self._rows(body, prepared, model, key, output)
            stack.enter_context(
                running(state, request, key, record, rows, sum(map(len, prepared.prompts)), output)
            )
            given = body.prompts if isinstance(body, CompletionRequest) else ()
            provenance = state.catalogue.provenance(model, given)
            written = (
                self._form(body, provenance, prepared.calls)
                if form is None
                else form(provenance, prepared.calls)
            )
            answer = TextResponse(state, body, record, output, model, written)
            if not body.stream:
                return await answer.complete()
            await answer.wait_for_first()
            return EventStream(answer, stack.pop_all())

    def _rows(
        self, body: Sampled, prepared: PreparedRequest, model: ServedModel, key: Key, output: RequestOutput
    ) -> list[ScheduledRow]:
        count, salt = body.n or 1, json.dumps([None if self._share_prefixes else key.id, body.cache_salt])
        row = self._engine.row
        return [
            ScheduledRow(
                make=partial(row, ids, model.pack, sampling, None, draw, copy_mask(prepared.mask), salt),
                pack=model.pack,
                cost=len(ids),
                place=number * count + draw,
                output=output,
                tenant=key.id,
                share=key.share,
                rank=key.rank,
                priority=body.priority or 0,
            )
            for number, (ids, sampling) in enumerate(zip(prepared.prompts, prepared.samplings, strict=True))
            for draw in range(count)
        ]

    def _form(
        self,
        body: ChatRequest | CompletionRequest,
        provenance: Provenance,
        calls: Callable[[], CallReader] | None,
    ) -> ResponseWriter:
        if isinstance(body, ChatRequest):
            return ChatWriter(body.model, provenance, self._tokens, calls)
        echoes = []
        if body.echo:
            decode = self.preparer.text
            echoes = [
                prompt if isinstance(prompt, str) else decode(prompt)
                for prompt in body.prompts
                for _ in range(body.n or 1)
            ]
        return CompletionWriter(body.model, provenance, self._tokens, echoes)


def open_api(
    engine: DecoderEngine, limits: ServerLimits, sampling: str = "model", share_prefixes: bool = False
) -> Api:
    """The API on an engine."""
    texts, rows = Texts(engine, limits, sampling, share_prefixes), engine.rows
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
                example={"messages": [{"role": "user", "content": "Hello"}]},
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


def _serves(engine: Engine) -> bool:
    return isinstance(engine, DecoderEngine)


APIS.register(ApiKind("texts", _serves, open_api, ("sampling", "share_prefixes")))
