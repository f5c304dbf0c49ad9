"""Embeddings of texts: OpenAI's ``/v1/embeddings``, on bundles for feature extraction."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from starlette.responses import Response

from ...io.typed_json import Misfit, StrictStruct
from ...runtime.engine.base import Engine
from ..answering import headers_of
from ..api import APIS, Api, ApiKind
from ..one_pass.rows import request_model, results, runs_task
from ..openai.answers import PassUsage, Provenance
from ..openai.requests import Mixed, as_list, one_kind
from ..route import RouteSpec, json_response
from ..state import RequestContext
from ..tenants.limits import ServerLimits


class EmbeddingRequest(StrictStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/embeddings``. An input is a text or a list of token ids, or several of one kind. Vectors
    have length 1 unless ``normalize`` is false.
    """

    model: str
    adapters: Mixed | None = None
    input: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    normalize: bool | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    user: str | None = None  # without an effect

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit for inputs of several kinds."""
        yield from one_kind("input", self.input)


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """The vector of one input, as numbers, or as base64 of its little-endian float32 bytes."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The response of ``/v1/embeddings``, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: PassUsage
    system_fingerprint: str
    adapterpack: Provenance


async def embeddings(context: RequestContext) -> Response:
    """``POST /v1/embeddings``: returns the vectors of texts."""
    body = await context.read_body(EmbeddingRequest)
    model = request_model(context, body.model, body.adapters)
    options: dict[str, Any] = {"normalize": body.normalize is not False, "dimensions": body.dimensions}
    given = as_list(body.input)
    rows = await results(context, model, given, param="input", options=options, priority=body.priority)
    write = _base64 if body.encoding_format == "base64" else list[float]
    answer = EmbeddingAnswer(
        data=[Embedding(index=place, embedding=write(row["embedding"])) for place, row in enumerate(rows)],
        model=body.model,
        usage=PassUsage.of(context.record.prompt_tokens),
        system_fingerprint=model.digest,
        adapterpack=context.state.catalogue.provenance(model, given),
    )
    return json_response(answer, headers=headers_of(model))


def _base64(vector: list[float]) -> str:
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode()


def open_api(engine: Engine, limits: ServerLimits) -> Api:
    """Makes the API for an engine."""
    return Api(
        (
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
    )


def _serves(engine: Engine) -> bool:
    return runs_task(engine, "feature-extraction")


APIS.register(ApiKind("embeddings", _serves, open_api))
