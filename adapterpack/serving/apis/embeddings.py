"""Embeddings of texts: OpenAI's ``/v1/embeddings``, on bundles for feature extraction."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from starlette.responses import Response

from ...io import ClosedStruct, FrozenStruct, Misfit, PositiveWhole
from .. import APIS, Api, ApiKind, RequestContext, RouteSpec
from ..one_pass.rows import PassAnswer, answer, results, runs_task
from ..openai import Mixed, Priority, as_list, one_kind


class EmbeddingRequest(ClosedStruct, kw_only=True):
    """``POST /v1/embeddings``. An input is a text or a list of token ids, or several of one kind. Vectors
    have length 1 unless ``normalize`` is false.
    """

    model: str
    adapters: Mixed | None = None
    input: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveWhole | None = None
    normalize: bool | None = None
    priority: Priority | None = None
    user: str | None = None  # without an effect

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit for inputs of several kinds."""
        yield from one_kind("input", self.input)


class Embedding(FrozenStruct, kw_only=True):
    """The vector of one input, as numbers, or as base64 of its little-endian float32 bytes."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(PassAnswer, kw_only=True):
    """The response of ``/v1/embeddings``, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]


async def embeddings(context: RequestContext) -> Response:
    """``POST /v1/embeddings``: returns the vectors of texts."""
    body = await context.read_body(EmbeddingRequest)
    options: dict[str, Any] = {"normalize": body.normalize is not False, "dimensions": body.dimensions}
    given = as_list(body.input)
    model = await context.request_model(body.model, body.adapters, given)
    rows = await results(context, model, given, param="input", options=options, priority=body.priority)
    write = _base64 if body.encoding_format == "base64" else list[float]
    data = [Embedding(index=place, embedding=write(row["embedding"])) for place, row in enumerate(rows)]
    return answer(context, model, body.model, EmbeddingAnswer, given, data=data)


def _base64(vector: list[float]) -> str:
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode()


ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec(
        "POST",
        "/v1/embeddings",
        embeddings,
        "key",
        "vectors of texts",
        EmbeddingRequest,
        EmbeddingAnswer,
        example={"input": "Hello"},
    ),
)


APIS.register(
    ApiKind(
        "embeddings",
        lambda engine: runs_task(engine, "feature-extraction"),
        lambda engine, limits: Api(ROUTES),
    )
)
