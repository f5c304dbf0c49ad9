"""Answers a request: its rows go to the engine, and what they say becomes one object, or a stream of
chunks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from ..http.http_error import Refused
from .catalogue import Model
from .observability.audit import Record
from .openai import sse
from .openai.answers import Usage
from .openai.errors import details, refused_of
from .openai.requests import Sampled
from .openai.response_writer import Form
from .scheduling.engine_thread import EngineStopped
from .scheduling.rows import Outbox, Row
from .state import State
from .tenants.keys import Key

ALIVE_SECONDS = 15.0
"""After which a stream says that it is alive."""
GONE = 499
"""The status in the audit of a request whose client has gone: nobody gets it."""


def headers_of(model: Model) -> dict[str, str]:
    """What answers a request, as headers say it."""
    return {"X-Adapterpack-Adapter": model.adapter or "", "X-Adapterpack-Digest": model.digest}


@contextmanager
def running(
    state: State,
    request: Request,
    key: Key,
    record: Record,
    rows: Sequence[Row],
    prompt_tokens: int,
    outbox: Outbox,
) -> Iterator[None]:
    """The rows of a request run, for as long as the block lasts and the client is there.

    Raises:
        Refused: the key has not so many tokens left.
    """
    state.quotas.read(key, prompt_tokens)
    record.rows, record.prompt_tokens = len(rows), prompt_tokens
    with _recorded(state, key, record, outbox), ExitStack() as stack:
        stack.enter_context(state.traffic.counted(key.id, record, rows, outbox))
        stack.callback(state.engine.cancel, rows)
        stack.enter_context(_watched(request, outbox))
        state.engine.add(rows)
        yield


@contextmanager
def _recorded(state: State, key: Key, record: Record, outbox: Outbox) -> Iterator[None]:
    """Writes down at the end what the rows took."""
    try:
        yield
    finally:
        record.completion_tokens, record.first, record.last = outbox.tokens, outbox.first, outbox.last
        if outbox.left:
            record.outcome = "disconnected"
        elif not record.outcome:
            record.outcome = ",".join(dict.fromkeys(str(row.reason) for row in outbox.said))
        state.quotas.wrote(key, outbox.tokens)
        state.gate.took(time.monotonic() - record.started)


@contextmanager
def _watched(request: Request, outbox: Outbox) -> Iterator[None]:
    """While the block lasts, somebody waits for the client to go."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        outbox.leave()

    task = asyncio.create_task(wait())
    try:
        yield
    finally:
        task.cancel()


class Awaited:
    """The rows of one request, which somebody waits for."""

    def __init__(self, state: State, record: Record, outbox: Outbox) -> None:
        self.state, self.record, self.outbox = state, record, outbox
        self._until = record.started + state.limits.request_seconds

    async def ended(self) -> None:
        """Waits until all rows have ended.

        Raises:
            Refused: a row failed, or time is over.
        """
        while not self.outbox.ended:
            await self.changed(None)
        self.require_well()

    async def changed(self, seconds: float | None) -> bool:
        """Waits until a row has said something, at most so long.

        Raises:
            Refused: the request's time is over, or the client has gone.
        """
        left = self._until - time.monotonic()
        changed = await self.outbox.changed(left if seconds is None else min(seconds, left))
        if self.outbox.left:
            raise Refused(GONE, "disconnected", "the client has gone")
        if not changed and time.monotonic() >= self._until:
            raise Refused(
                504,
                "deadline_exceeded",
                f"the answer takes longer than {self.state.limits.request_seconds:g} s",
            )
        return changed

    def require_well(self) -> None:
        """Checks that no row has failed.

        Raises:
            Refused: one has.
        """
        error = self.outbox.error
        if error is not None:
            raise (
                Refused(503, error.code, error.what, retry_after=10)
                if isinstance(error, EngineStopped)
                else refused_of(error)
            )
        if any(row.reason == "cancelled" for row in self.outbox.said):
            raise Refused(503, "cancelled", "the server ended before the answer did", retry_after=10)


class Answer(Awaited):
    """The text that answers one request, which its rows are writing."""

    def __init__(
        self, state: State, body: Sampled, record: Record, outbox: Outbox, model: Model, form: Form
    ) -> None:
        super().__init__(state, record, outbox)
        self.form, self.headers = form, headers_of(model)
        options = body.stream_options
        self._counted = bool(options and options.include_usage)

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        prompt, answered = self.record.prompt_tokens, self.outbox.tokens
        return Usage(prompt, answered, prompt + answered)

    async def whole(self) -> Response:
        """The answer once all rows have ended.

        Raises:
            Refused: a row failed, or time is over.
        """
        await self.ended()
        self.record.status = 200
        return Response(
            msgspec.json.encode(self.form.whole(self.outbox.said, self.usage)),
            200,
            self.headers,
            "application/json",
        )

    async def begun(self) -> None:
        """Waits for the first token: an error before it is an answer of its own. A row that waits long in the
        queue begins without.
        """
        await self.changed(self.state.limits.first_seconds)
        self.require_well()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The events of the stream, those of one step of the engine together."""
        unknown = None if self._counted else UNSET
        count, event = len(self.outbox.said), self.form.event
        pieces = [event(chunk) for place in range(count) for chunk in self.form.opening(place, unknown)]
        sent, going = [(0, 0)] * count, set(range(count))
        while going:
            for place in sorted(going):
                row, (characters, choices) = self.outbox.said[place], sent[place]
                reason = row.reason
                chunks = self.form.piece(place, row.text[characters:], row.choices[choices:], reason, unknown)
                sent[place] = len(row.text), len(row.choices)
                pieces += map(event, chunks)
                if reason is not None:
                    going.discard(place)
            if pieces:
                yield b"".join(pieces)
            if going:
                pieces = [] if await self.changed(ALIVE_SECONDS) else [sse.ALIVE]
                self.require_well()
        yield b"".join(map(event, self.form.closing(self.usage, self._counted))) + self.form.end


class Stream(Response):
    """An answer in server-sent events; what ``stack`` holds is given up when it ends, however it does."""

    def __init__(self, answer: Answer, stack: ExitStack) -> None:
        self._answer, self._stack, self.status_code, self.background = answer, stack, 200, None
        self.init_headers({**sse.HEADERS, **answer.headers, "content-type": sse.TYPE})

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Any]) -> None:
        """Sends the events; an error after the first one is an event, too, and the last."""
        record = self._answer.record
        with self._stack:
            record.status = 200
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for data in self._answer.chunks():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Refused as refused:
                record.outcome = refused.name
                if refused.status != GONE:
                    await send(
                        {"type": "http.response.body", "body": sse.event(details(refused)), "more_body": True}
                    )
            await send({"type": "http.response.body", "body": b"", "more_body": False})
