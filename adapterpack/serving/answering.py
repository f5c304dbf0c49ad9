"""Answers requests: submits their rows to the engine, and writes the output as one JSON object or a stream of
server-sent events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..http import HTTPError
from .catalogue import ServedModel
from .openai import ALIVE, STREAM_HEADERS, STREAM_TYPE, PromptDetails, ResponseWriter, Usage, as_http_error
from .route import RequestContext, json_response
from .scheduling import EngineStopped, RequestOutput, ScheduledRow

ALIVE_SECONDS = 15.0
"""Seconds without output after which a stream sends a comment to stay alive."""
GONE = 499
"""The status in the audit log for a request whose client has disconnected; it is never sent."""


def headers_of(model: ServedModel) -> dict[str, str]:
    """Returns the response headers that name the adapter and its digest."""
    return {"X-Adapterpack-Adapter": model.adapter or "", "X-Adapterpack-Digest": model.digest}


@contextmanager
def running(
    context: RequestContext,
    rows: Sequence[ScheduledRow],
    prompt_tokens: int,
    output: RequestOutput,
) -> Iterator[None]:
    """Runs the rows of a request for as long as the block lasts, and records their tokens, times and outcome.
    The rows are cancelled when the block ends, and the client is watched meanwhile.

    Raises:
        HTTPError: the key has too few tokens left.
    """
    record, state = context.record, context.state
    state.quotas.charge_prompt(context.key, prompt_tokens)
    record.rows = len(rows)
    record.prompt_tokens = prompt_tokens
    watching = asyncio.create_task(_watch_client(context.request, output))
    with state.traffic.count(context.key.id, record, rows, output):
        state.engine.add(rows)
        try:
            yield
        finally:
            watching.cancel()
            state.engine.cancel(rows)
            record.completion_tokens, record.first, record.last = output.tokens, output.first, output.last
            if output.left:
                record.outcome = "disconnected"
            elif not record.outcome:
                record.outcome = ",".join(dict.fromkeys(str(row.reason) for row in output.sequences))
            state.quotas.charge_answer(context.key, output.tokens)
            state.admission.note_time(time.monotonic() - record.started)


async def _watch_client(request: Request, output: RequestOutput) -> None:
    """Waits for the client to disconnect."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    output.leave()


class PendingResponse:
    """A response that waits for the rows of its request."""

    def __init__(self, context: RequestContext, output: RequestOutput) -> None:
        self.state = context.state
        self.record = context.record
        self.output = output
        self._until = self.record.started + self.state.limits.request_seconds

    async def wait_until_ended(self) -> None:
        """Waits until all rows have ended.

        Raises:
            HTTPError: a row failed, or time is over.
        """
        while not self.output.ended:
            await self.wait(None)
        self.require_well()

    async def wait(self, seconds: float | None) -> bool:
        """Waits until a row has new output, at most ``seconds``, and returns whether there is any.

        Raises:
            HTTPError: the request's time is over, or the client has disconnected.
        """
        left = self._until - time.monotonic()
        changed = await self.output.wait(left if seconds is None else min(seconds, left))
        if self.output.left:
            raise HTTPError(GONE, "disconnected", "the client has gone")
        if not changed and time.monotonic() >= self._until:
            raise HTTPError(
                504,
                "deadline_exceeded",
                f"the answer takes longer than {self.state.limits.request_seconds:g} s",
            )
        return changed

    def require_well(self) -> None:
        """Checks that no row has failed.

        Raises:
            HTTPError: a row has failed.
        """
        error = self.output.error
        if error is not None:
            raise (
                HTTPError(503, error.code, error.what, retry_after=10)
                if isinstance(error, EngineStopped)
                else as_http_error(error)
            )
        if any(row.reason == "cancelled" for row in self.output.sequences):
            raise HTTPError(503, "cancelled", "the server ended before the answer did", retry_after=10)


class TextResponse(PendingResponse):
    """The response to one request for text, written while its rows generate."""

    def __init__(
        self, context: RequestContext, output: RequestOutput, model: ServedModel, writer: ResponseWriter
    ) -> None:
        super().__init__(context, output)
        self.writer = writer
        self.headers = headers_of(model)

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        prompt, answered = self.record.prompt_tokens, self.output.tokens
        return Usage(prompt, answered, prompt + answered, PromptDetails(self.output.reused))

    async def complete(self) -> Response:
        """Returns the complete response once all rows have ended.

        Raises:
            HTTPError: a row failed, or time is over.
        """
        await self.wait_until_ended()
        self.record.status = 200
        answer = self.writer.write_response(self.output.sequences, self.usage)
        return json_response(answer, headers=self.headers)

    async def wait_for_first(self) -> None:
        """Waits for the first token, so that an error before it gets an HTTP status. A row that queues for
        long starts its stream without one.
        """
        await self.wait(self.state.limits.first_seconds)
        self.require_well()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yields the events of the stream, those of one engine step together."""
        count = len(self.output.sequences)
        event = self.writer.event
        pieces: list[bytes] = []
        sent = [(0, 0)] * count
        going = set(range(count))
        begun = set()
        while going:
            self.writer.usage = self.usage
            for place in sorted(going):
                row = self.output.sequences[place]
                characters, choices = sent[place]
                if place not in begun:
                    if self.writer.waits and not row.begun:
                        continue
                    begun.add(place)
                    pieces += map(event, self.writer.write_start(place, row))
                reason = row.reason
                chunks = self.writer.write_piece(place, row.text[characters:], row.choices[choices:], reason)
                sent[place] = len(row.text), len(row.choices)
                pieces += map(event, chunks)
                if reason is not None:
                    going.discard(place)
            if pieces:
                yield b"".join(pieces)
            if going:
                pieces = [] if await self.wait(ALIVE_SECONDS) else [ALIVE]
                self.require_well()
        yield b"".join(map(event, self.writer.write_end(self.usage))) + self.writer.end


class EventStream(Response):
    """A response of server-sent events; ``stack`` is closed when it ends for any reason."""

    def __init__(self, answer: TextResponse, stack: ExitStack) -> None:
        self._answer = answer
        self._stack = stack
        self.status_code = 200
        self.background = None
        self.init_headers({**STREAM_HEADERS, **answer.headers, "content-type": STREAM_TYPE})

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Any]) -> None:
        """Sends the events. The status is sent already, so an error becomes the last event."""
        record = self._answer.record
        with self._stack:
            record.status = 200
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for data in self._answer.chunks():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except HTTPError as refused:
                record.outcome = refused.name
                if refused.status != GONE:
                    await send(
                        {
                            "type": "http.response.body",
                            "body": self._answer.writer.error(refused),
                            "more_body": True,
                        }
                    )
            await send({"type": "http.response.body", "body": b"", "more_body": False})
