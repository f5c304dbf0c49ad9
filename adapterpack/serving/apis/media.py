"""``/v1/predict``: what a model says of pictures, of sounds, or of texts, on bundles whose rows are one of
these and have no route of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import asdict
from starlette.responses import Response

from ...http import invalid_request
from ...io import ClosedStruct
from ...runtime import EncoderEngine, Engine
from .. import APIS, Api, ApiKind, RequestContext, RouteSpec
from ..one_pass.rows import PassAnswer, answer, engine_of, results
from ..openai import Priority, as_list
from ..tenants import ServerLimits

_COLUMNS = {"data:image/": "image", "data:audio/": "audio"}
"""What a data URL begins with -> the column of a row. A name of a file is never taken: it would be one of the
server's.
"""


class Question(ClosedStruct):
    """A question, and the text that answers it."""

    question: str
    context: str


class PredictRequest(ClosedStruct, kw_only=True):
    """``POST /v1/predict``. An input is a picture or a sound as a data URL, a text, or a question about a
    text, as the task has it; or several. ``parameters`` are options of the task, such as the ``threshold`` of
    a detector.
    """

    model: str
    input: str | Question | Annotated[list[str | Question], Meta(min_length=1)]
    parameters: dict[str, Any] | None = None
    priority: Priority | None = None


class PredictAnswer(PassAnswer, kw_only=True):
    """The response of ``/v1/predict``: of each input what ``adapterpack run`` answers, with its ``index``."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


async def predict(context: RequestContext) -> Response:
    """``POST /v1/predict``: returns what the model says of pictures, sounds or texts."""
    body = await context.read_body(PredictRequest)
    given = as_list(body.input)
    texts = "input_ids" in engine_of(context.state).bundle.task.inputs
    rows = [_row(one, texts) for one in given]
    model = await context.request_model(body.model, texts=rows if texts else ())
    found = await results(
        context, model, rows, param="input", options=body.parameters, priority=body.priority
    )
    data = [{"index": place, **row} for place, row in enumerate(found)]
    return answer(context, model, body.model, PredictAnswer, given, data=data)


def _row(given: str | Question, texts: bool) -> dict[str, str]:
    if isinstance(given, Question):
        return asdict(given)
    if texts:
        return {"text": given}
    for prefix, column in _COLUMNS.items():
        if given.startswith(prefix):
            return {column: given}
    raise invalid_request(f"an input is a data URL: {' or '.join(_COLUMNS)}...", "input")


_TEXTS: Mapping[str, str | dict[str, str]] = {
    "token-classification": "Ada Lovelace was born in London.",
    "question-answering": {"question": "Who was born?", "context": "Ada Lovelace was born in London."},
}
"""Tasks of texts that have no route of their own, each with an input to try."""


def _lacks_route(engine: Engine) -> bool:
    if not isinstance(engine, EncoderEngine):
        return False
    return engine.bundle.task.name in _TEXTS or "input_ids" not in engine.bundle.task.inputs


def _open(engine: Engine, limits: ServerLimits) -> Api:
    task = engine.bundle.task
    kind = "image/png" if "pixel_values" in task.inputs else "audio/wav"
    return Api(
        (
            RouteSpec(
                "POST",
                "/v1/predict",
                predict,
                "key",
                "what the model says of pictures, sounds or texts",
                PredictRequest,
                PredictAnswer,
                example={"input": _TEXTS.get(task.name, f"data:{kind};base64,...")},
            ),
        )
    )


APIS.register(ApiKind("media", _lacks_route, _open))
