"""Classification routes: ``/v1/classify``, and ``/v1/rerank`` for heads with one label, on bundles for text
classification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import asdict
from starlette.responses import Response

from ...http import HTTPError
from ...io import ClosedStruct, FrozenStruct, Misfit, PositiveWhole
from .. import APIS, Api, ApiKind, RequestContext, RouteSpec
from ..one_pass.rows import PassAnswer, answer, labels_of, results, runs_task
from ..openai import Priority, as_list, one_kind


class Pair(ClosedStruct):
    """Two texts that form one input, such as a claim and its evidence; or a prompt and the answer that a
    reward model scores, its ``completion``.
    """

    text: str
    text_pair: str | None = None
    completion: str | None = None


class ClassifyRequest(ClosedStruct, kw_only=True):
    """``POST /v1/classify``. An input is a text, a pair of texts, or token ids, or several of one kind."""

    model: str
    input: str | Pair | Annotated[list[str | int | list[int] | Pair], Meta(min_length=1)]
    priority: Priority | None = None
    user: str | None = None  # without an effect

    def breaches(self) -> Iterator[Misfit]:
        """Yields a misfit for inputs of several kinds."""
        yield from one_kind("input", self.input)


class Classified(FrozenStruct):
    """The most likely label of one input, and the probability of each label of the adapter."""

    index: int
    label: str
    scores: dict[str, float]


class ClassifyAnswer(PassAnswer, kw_only=True):
    """The response of ``/v1/classify``, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Classified]


class RerankRequest(ClosedStruct, kw_only=True):
    """``POST /v1/rerank``, as in Cohere's and Jina's APIs: ranks documents by their fit to a query, with a
    head of one label.
    """

    model: str
    query: str
    documents: Annotated[list[str], Meta(min_length=1)]
    top_n: PositiveWhole | None = None
    return_documents: bool | None = None
    priority: Priority | None = None


class Document(FrozenStruct):
    """A document's text."""

    text: str


class Ranked(FrozenStruct):
    """One document: its index in the request, and its score between 0 and 1."""

    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class RerankAnswer(PassAnswer, kw_only=True):
    """The response of ``/v1/rerank``, the best document first."""

    results: list[Ranked]


async def classify(context: RequestContext) -> Response:
    """``POST /v1/classify``: returns the labels of texts."""
    body = await context.read_body(ClassifyRequest)
    given = [asdict(item) if isinstance(item, Pair) else item for item in as_list(body.input)]
    model = await context.request_model(body.model, texts=given)
    labels_of(context.state, model)
    rows = await results(context, model, given, param="input", priority=body.priority)
    data = [Classified(place, row["label"], row["scores"]) for place, row in enumerate(rows)]
    return answer(context, model, body.model, ClassifyAnswer, given, data=data)


async def rerank(context: RequestContext) -> Response:
    """``POST /v1/rerank``: ranks documents by their fit to a query."""
    body = await context.read_body(RerankRequest)
    model = await context.request_model(body.model, texts=[body.query, *body.documents])
    labels = labels_of(context.state, model)
    if len(labels) != 1:
        raise HTTPError(
            400,
            "no_ranking_head",
            f"a head that ranks has one label, and this one has {len(labels)}: use /v1/classify",
            param="model",
        )
    pairs: list[Mapping[str, Any]] = [{"text": body.query, "text_pair": text} for text in body.documents]
    rows = await results(context, model, pairs, param="documents", priority=body.priority)
    scores = [row["scores"][labels[0]] for row in rows]
    best = sorted(range(len(rows)), key=lambda place: (-scores[place], place))[: body.top_n]
    ranked = [
        Ranked(place, scores[place], Document(body.documents[place]) if body.return_documents else UNSET)
        for place in best
    ]
    return answer(context, model, body.model, RerankAnswer, results=ranked)


ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec(
        "POST",
        "/v1/classify",
        classify,
        "key",
        "labels of texts",
        ClassifyRequest,
        ClassifyAnswer,
        example={"input": "Hello"},
    ),
    RouteSpec(
        "POST",
        "/v1/rerank",
        rerank,
        "key",
        "documents by how well they fit a query",
        RerankRequest,
        RerankAnswer,
    ),
)


APIS.register(
    ApiKind(
        "classification",
        lambda engine: runs_task(engine, "text-classification"),
        lambda engine, limits: Api(ROUTES),
    )
)
