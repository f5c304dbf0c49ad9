"""Runs the rows of a request to an encoder: prepares them on a thread, queues them, and returns once all have
ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from starlette.responses import Response

from ...errors import ConfigError
from ...http import HTTPError, invalid_request
from ...io import FrozenStruct
from ...runtime import EncoderEngine, Engine, prompt_ids
from ...tasks import PreparedRow
from .. import PendingResponse, RequestContext, ServedModel, headers_of, json_response
from ..answering import running
from ..openai import PassUsage, Provenance, as_http_error
from ..route import State
from ..scheduling import RequestOutput, ScheduledRow

Given = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or a row with the columns of its task."""


def runs_task(engine: Engine, *names: str) -> bool:
    """Returns whether an engine is an encoder engine for one of these tasks."""
    return isinstance(engine, EncoderEngine) and engine.bundle.task.name in names


def engine_of(state: State) -> EncoderEngine:
    """Returns the encoder engine of a server whose routes need one."""
    engine = state.engine.engine
    assert isinstance(engine, EncoderEngine)
    return engine


def labels_of(state: State, model: ServedModel) -> Sequence[str]:
    """Returns the labels of a model's head.

    Raises:
        HTTPError: the head was never trained.
    """
    labels = engine_of(state).bundle.head(model.pack).labels
    if labels is None:
        raise HTTPError(
            400, "no_head", "this model has no trained head: name an adapter that has one", param="model"
        )
    return labels


async def results(
    context: RequestContext,
    model: ServedModel,
    rows: Sequence[Given],
    *,
    param: str,
    options: Mapping[str, Any] | None = None,
    priority: int | None = None,
) -> list[Mapping[str, Any]]:
    """Runs rows and returns the task's result for each; errors name ``param``, the field that holds them.

    Raises:
        HTTPError: there are too many rows, a row does not fit the task, the server is busy, or time is over.
    """
    engine = engine_of(context.state)
    if len(rows) > context.state.limits.inputs:
        raise invalid_request(f"a request may have at most {context.state.limits.inputs} inputs", param)
    with ExitStack() as stack:
        # as many rows as one pass runs count as one answer
        stack.enter_context(context.state.admission.admit(context.key, -(-len(rows) // engine.rows_a_turn)))
        prepared = await asyncio.to_thread(_prepare, engine, rows, options or {}, param)
        output = RequestOutput(len(rows))
        queued = [
            ScheduledRow(
                make=partial(engine.bind, one, chosen, model.pack),
                pack=model.pack,
                cost=one.tokens,
                place=place,
                output=output,
                key=context.key,
                priority=priority or 0,
            )
            for place, (one, chosen) in enumerate(prepared)
        ]
        stack.enter_context(running(context, queued, sum(row.cost for row in queued), output))
        await PendingResponse(context, output).wait_until_ended()
        return [sequence.result for sequence in output.sequences]


class PassAnswer(FrozenStruct, kw_only=True):
    """What the responses of an encoder have in common."""

    model: str
    usage: PassUsage
    system_fingerprint: str
    adapterpack: Provenance


def answer(
    context: RequestContext,
    model: ServedModel,
    name: str,
    kind: type[PassAnswer],
    given: Sequence[object] = (),
    **fields: Any,
) -> Response:
    """Makes the response of a model, which the request calls ``name``, from the fields of its own."""
    provenance = context.state.catalogue.provenance(model, given)
    return json_response(
        kind(
            model=provenance.called(name),
            usage=PassUsage.of(context.record.prompt_tokens),
            system_fingerprint=model.digest,
            adapterpack=provenance,
            **fields,
        ),
        headers=headers_of(model),
    )


def _prepare(
    engine: EncoderEngine, rows: Sequence[Given], options: Mapping[str, Any], param: str
) -> list[tuple[PreparedRow, Any]]:
    prepared = []
    for number, row in enumerate(rows):
        try:
            prepared.append(
                engine.prepare(prompt_ids(engine.bundle, row) if isinstance(row, list) else row, **options)
            )
        except ConfigError as error:
            refused = as_http_error(error)
            if error.where in options:
                raise refused from error
            place = f"{param}.{number}: " if len(rows) > 1 else ""
            raise HTTPError(refused.status, refused.name, f"{place}{refused.what}", param=param) from error
    return prepared
