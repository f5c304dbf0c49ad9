"""OpenAI's routes for speech: ``/v1/audio/transcriptions`` and ``/v1/audio/translations``. They serve models
that hear and write.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from ...io import ClosedStruct, FrozenStruct
from ...runtime import DecoderEngine, Engine
from ...runtime.generation import Sampling, sampling_of
from ...runtime.media import seconds_of
from ...tasks import Arrays, first_tokens, languages_of
from .. import APIS, Api, ApiKind, PendingResponse, RequestContext, RouteSpec, headers_of, json_response
from ..answering import running
from ..openai import Priority, Provenance
from ..scheduling import RequestOutput, ScheduledRow


class TranslationRequest(ClosedStruct, kw_only=True):
    """The form of ``POST /v1/audio/translations``. The file is a wave file at the model's rate."""

    model: str
    file: bytes
    response_format: Literal["json", "text", "verbose_json"] = "json"
    temperature: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: int | None = None
    priority: Priority | None = None


class TranscriptionRequest(TranslationRequest, kw_only=True):
    """The form of ``POST /v1/audio/transcriptions``. ``language`` is a code such as ``en``; without one it is
    the likeliest of those that the model knows.
    """

    language: str | None = None


class Heard(FrozenStruct):
    """The length of what was heard."""

    seconds: float
    type: Literal["duration"] = "duration"


class Transcription(FrozenStruct, kw_only=True):
    """The text of a recording; ``verbose_json`` also has the language, where the model names any, the task
    and the seconds.
    """

    text: str
    usage: Heard
    adapterpack: Provenance
    task: str | UnsetType = UNSET
    language: str | UnsetType = UNSET
    duration: float | UnsetType = UNSET


async def transcribe(context: RequestContext) -> Response:
    """``POST /v1/audio/transcriptions``: writes down what is said."""
    body = await context.read_form(TranscriptionRequest)
    return await _answer(context, body, "transcribe", body.language)


async def translate(context: RequestContext) -> Response:
    """``POST /v1/audio/translations``: writes down in English what is said."""
    return await _answer(context, await context.read_form(TranslationRequest), "translate", None)


async def _answer(
    context: RequestContext, body: TranslationRequest, task: str, language: str | None
) -> Response:
    engine: Any = context.state.engine.engine
    model = await context.request_model(body.model)
    output = RequestOutput(1)
    with context.state.admission.admit(context.key, 1):
        config = engine.bundle.generation_config
        languages = languages_of(config)
        sampling = _sampling(engine, body, first_tokens(config, language, task))
        features, seconds = await asyncio.to_thread(_hear, engine, body.file)
        row = ScheduledRow(
            make=partial(engine.row, (), model.pack, sampling, features),
            pack=model.pack,
            cost=1,
            place=0,
            output=output,
            key=context.key,
            priority=body.priority or 0,
        )
        with running(context, [row], 0, output):
            await PendingResponse(context, output).wait_until_ended()
    (said,) = output.sequences
    if body.response_format == "text":
        return Response(said.text, 200, headers_of(model), "text/plain")
    answer = Transcription(
        text=said.text, usage=Heard(seconds), adapterpack=context.state.catalogue.provenance(model, ())
    )
    if body.response_format == "verbose_json":
        spoken = [
            code for code, token in languages.items() if said.choices and token == said.choices[0].token
        ]
        answer = msgspec.structs.replace(
            answer, task=task, duration=seconds, language=spoken[0] if spoken else UNSET
        )
    return json_response(answer, headers=headers_of(model))


def _sampling(engine: DecoderEngine, body: TranslationRequest, first: Sequence[Any]) -> Sampling:
    """The model's own rules of generation, with what the request says; the language is the first choice."""
    bundle = engine.bundle
    bounded = bundle.generation_config.keys() & {"max_length", "max_new_tokens"}
    given = {
        **({} if bounded else {"max_new_tokens": engine.max_length}),
        "temperature": body.temperature,
        "seed": secrets.randbits(63) if body.seed is None else body.seed,
        "first_tokens": first,
        "logprobs": 0 if body.response_format == "verbose_json" else None,
    }
    return sampling_of({"sampling": "model", **given}, bundle.generation_config, bundle.folder)


def _hear(engine: DecoderEngine, data: bytes) -> tuple[Arrays, float]:
    (features,) = engine.bundle.sounds([data])
    return features, seconds_of(data)


def _hears(engine: Engine) -> bool:
    return isinstance(engine, DecoderEngine) and engine.bundle.sound_input is not None


ROUTES: tuple[RouteSpec, ...] = tuple(
    RouteSpec("POST", f"/v1/audio/{name}", handler, "key", summary, body, Transcription, form=True)
    for name, handler, summary, body in (
        ("transcriptions", transcribe, "what is said", TranscriptionRequest),
        ("translations", translate, "what is said, in English", TranslationRequest),
    )
)

APIS.register(ApiKind("speech", _hears, lambda engine, limits: Api(ROUTES)))
