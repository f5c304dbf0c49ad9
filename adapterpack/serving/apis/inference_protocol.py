"""The Open Inference Protocol, version 2 (https://github.com/kserve/open-inference-protocol), in JSON: takes
texts and returns tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from ...http import invalid_request
from ...io import ClosedStruct, FrozenStruct, Misfit, PositiveWhole, breaches_inside
from ...version import VERSION
from .. import APIS, Api, ApiKind, RequestContext, RouteSpec, headers_of, json_response, routes
from ..one_pass.rows import engine_of, labels_of, results, runs_task
from ..one_pass.tensors import OUTPUTS, extents_of, flat
from ..openai import ErrorForm, Provenance

COLUMNS = ("text", "text_pair")
"""The names of inputs: the texts of rows, and the second texts of pairs."""


class PlainJson(ClosedStruct):
    """Parameters of a tensor. Its data must be JSON; the binary extension is not supported."""

    binary_data: Literal[False] | None = None


class InputTensor(ClosedStruct):
    """One column of the rows, with as many texts as its shape ``[rows]`` or ``[rows, 1]`` says."""

    name: Literal["text", "text_pair"]
    shape: Annotated[list[PositiveWhole], Meta(min_length=1, max_length=2)]
    datatype: Literal["BYTES"]
    data: list[str | list[str]]
    parameters: PlainJson | None = None

    @property
    def texts(self) -> list[str]:
        """The texts, one for each row."""
        return [text for item in self.data for text in ([item] if isinstance(item, str) else item)]

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit if the data do not have the shape."""
        if self.shape[1:] not in ([], [1]) or len(self.texts) != self.shape[0]:
            yield Misfit("/shape", f"there are {len(self.texts)} texts, and the shape is {self.shape}")


class WantedTensor(ClosedStruct):
    """An output that the response should contain."""

    name: str
    parameters: PlainJson | None = None


class InferRequest(ClosedStruct, kw_only=True):
    """``POST /v2/models/{model}/infer``. ``parameters`` are options of the task. Without ``outputs`` the
    response contains all of them.
    """

    inputs: Annotated[list[InputTensor], Meta(min_length=1, max_length=2)]
    outputs: Annotated[list[WantedTensor], Meta(max_length=16)] | None = None
    id: Annotated[str, Meta(max_length=256)] | None = None
    parameters: dict[str, Any] | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields misfits for missing texts, duplicate columns, and columns of different lengths."""
        names = [tensor.name for tensor in self.inputs]
        if "text" not in names or len(set(names)) < len(names):
            yield Misfit("/inputs", "there is text once, and text_pair at most once")
        yield from breaches_inside(self.inputs, "/inputs")
        if len({len(tensor.texts) for tensor in self.inputs}) > 1:
            yield Misfit("/inputs", "text and text_pair have one length")


class TensorAnswer(FrozenStruct):
    """One output, with its data in row-major order."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class InferAnswer(FrozenStruct, kw_only=True):
    """The response of an inference. ``model_version`` is the digest of the adapter or bundle that
    answered.
    """

    model_name: str
    model_version: str
    id: str | UnsetType = UNSET
    outputs: list[TensorAnswer]
    parameters: Provenance


class TensorCard(FrozenStruct):
    """An input or output; an extent of -1 is variable."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(FrozenStruct, kw_only=True):
    """The inputs and outputs of a model; its version is its digest."""

    name: str
    versions: list[str]
    platform: str = "onnxruntime_onnx"
    inputs: list[TensorCard]
    outputs: list[TensorCard]


class ServerMetadata(FrozenStruct):
    """The server's name and version."""

    name: str
    version: str
    extensions: list[str]


class ProtocolError(FrozenStruct):
    """The body of an error response."""

    error: str


ERRORS = ErrorForm(ProtocolError, lambda refused: ProtocolError(refused.what))
_route = partial(RouteSpec, errors=ERRORS)


async def server(context: RequestContext) -> Response:
    """``GET /v2``: describes the server."""
    return json_response(ServerMetadata("adapterpack", VERSION, []))


async def live(context: RequestContext) -> Response:
    """``GET /v2/health/live``: the status of ``/health``."""
    status = (await routes.health(context)).status_code
    return json_response({"live": status == 200}, status)


async def ready(context: RequestContext) -> Response:
    """``GET /v2/health/ready``: the status of ``/ready``."""
    return await routes.ready(context)


async def model_ready(context: RequestContext) -> Response:
    """``GET /v2/models/{model}/ready``. An adapter is read when a row needs it, so a model is ready while the
    server is.
    """
    model = await context.request_model(context.request.path_params["model"], counts=False)
    status = (await routes.ready(context)).status_code
    return json_response({"name": model.name, "ready": status == 200}, status)


async def metadata(context: RequestContext) -> Response:
    """``GET /v2/models/{model}``: describes the inputs and outputs of a model."""
    model = await context.request_model(context.request.path_params["model"], counts=False)
    bundle = engine_of(context.state).bundle
    inputs = [
        TensorCard(name, "BYTES", [-1]) for name in COLUMNS[: 2 if OUTPUTS[bundle.task.name].pairs else 1]
    ]
    outputs = [
        TensorCard(column.name, column.datatype, column.extents(bundle, bundle.head(model.pack).labels))
        for column in OUTPUTS[bundle.task.name].columns
    ]
    return json_response(
        ModelMetadata(name=model.name, versions=[model.digest], inputs=inputs, outputs=outputs)
    )


async def infer(context: RequestContext) -> Response:
    """``POST /v2/models/{model}/infer``: runs rows and returns tensors."""
    body = await context.read_body(InferRequest)
    texts = {tensor.name: tensor.texts for tensor in body.inputs}
    model = await context.request_model(
        context.request.path_params["model"], texts=chain.from_iterable(texts.values())
    )
    task = engine_of(context.state).bundle.task
    wanted = OUTPUTS[task.name]
    columns = {column.name: column for column in wanted.columns}
    chosen = list(columns) if body.outputs is None else [tensor.name for tensor in body.outputs]
    if unknown := [name for name in chosen if name not in columns]:
        raise invalid_request(
            f"there is no output {unknown[0][:100]!r}: there are {', '.join(columns)}",
            "outputs",
        )
    if task.labelled:
        labels_of(context.state, model)
    if "text_pair" in texts and not wanted.pairs:
        raise invalid_request("this task takes one text a row", "inputs")
    rows = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
    said = await results(context, model, rows, param="inputs", options=body.parameters)
    outputs = []
    for name in dict.fromkeys(chosen):
        values = columns[name].values(said)
        shape = extents_of(values)
        outputs.append(
            TensorAnswer(name, shape, columns[name].datatype, flat(values) if math.prod(shape) else [])
        )
    provenance = context.state.catalogue.provenance(model)
    answer = InferAnswer(
        model_name=provenance.called(context.request.path_params["model"]),
        model_version=model.digest,
        id=UNSET if body.id is None else body.id,
        outputs=outputs,
        parameters=provenance,
    )
    return json_response(answer, headers=headers_of(model))


ROUTES: tuple[RouteSpec, ...] = (
    _route("GET", "/v2", server, "key", "the server", None, ServerMetadata),
    _route("GET", "/v2/health/live", live, "open", "whether the process works"),
    _route("GET", "/v2/health/ready", ready, "open", "whether it takes requests"),
    _route(
        "GET",
        "/v2/models/{model}",
        metadata,
        "key",
        "what a model takes and gives",
        None,
        ModelMetadata,
    ),
    _route("GET", "/v2/models/{model}/ready", model_ready, "key", "whether a model takes requests"),
    _route(
        "POST",
        "/v2/models/{model}/infer",
        infer,
        "key",
        "tensors of texts",
        InferRequest,
        InferAnswer,
    ),
)


APIS.register(
    ApiKind(
        "inference-protocol", lambda engine: runs_task(engine, *OUTPUTS), lambda engine, limits: Api(ROUTES)
    )
)
