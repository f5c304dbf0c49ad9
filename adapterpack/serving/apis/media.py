"""``/v1/predict``: what a model says of pictures or of sounds, on bundles whose rows are one picture or one
sound.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta
from starlette.responses import Response

from ...http.http_error import invalid_request
from ...io import StrictStruct
from ...runtime.engine.base import Engine
from ...runtime.engine.encoder_engine import EncoderEngine
from ..api import APIS, Api, ApiKind
from ..one_pass.rows import PassAnswer, answer, results
from ..openai.requests import Priority, as_list
from ..route import RequestContext, RouteSpec
from ..tenants.limits import ServerLimits

_COLUMNS = {"data:image/": "image", "data:audio/": "audio"}
"""What a data URL begins with -> the column of a row. A name of a file is never taken: it would be one of the
server's.
"""


class PredictRequest(StrictStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/predict``. An input is a picture or a sound as a data URL, or several; ``parameters`` are
    options of the task, such as the ``threshold`` of a detector.
    """

    model: str
    input: str | Annotated[list[str], Meta(min_length=1)]
    parameters: dict[str, Any] | None = None
    priority: Priority | None = None


class PredictAnswer(PassAnswer, frozen=True, kw_only=True):
    """The response of ``/v1/predict``: of each input what ``adapterpack run`` answers, with its ``index``."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


async def predict(context: RequestContext) -> Response:
    """``POST /v1/predict``: returns what the model says of pictures or sounds."""
    body = await context.read_body(PredictRequest)
    model, given = await context.request_model(body.model), as_list(body.input)
    rows = [_row(url) for url in given]
    found = await results(
        context, model, rows, param="input", options=body.parameters, priority=body.priority
    )
    data = [{"index": place, **row} for place, row in enumerate(found)]
    return answer(context, model, body.model, PredictAnswer, given, data=data)


def _row(url: str) -> dict[str, str]:
    for prefix, column in _COLUMNS.items():
        if url.startswith(prefix):
            return {column: url}
    raise invalid_request(f"an input is a data URL: {' or '.join(_COLUMNS)}...", "input")


def _sees_or_hears(engine: Engine) -> bool:
    return isinstance(engine, EncoderEngine) and "input_ids" not in engine.bundle.task.inputs


def _open(engine: Engine, limits: ServerLimits) -> Api:
    kind = "image/png" if "pixel_values" in engine.bundle.task.inputs else "audio/wav"
    return Api(
        (
            RouteSpec(
                "POST",
                "/v1/predict",
                predict,
                "key",
                "what the model says of pictures or sounds",
                PredictRequest,
                PredictAnswer,
                example={"input": f"data:{kind};base64,..."},
            ),
        )
    )


APIS.register(ApiKind("media", _sees_or_hears, _open))
