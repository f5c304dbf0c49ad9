"""What a bundle's manifest reports of quantization, of replayed canaries and of the engine's graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NotRequired, TypedDict

from msgspec import Meta

Errors = Mapping[str, Annotated[float, Meta(ge=0)]]
# a schema leaves out a Literal that is a key, by msgspec's version
Accuracy = Annotated[str, Meta(pattern=r"^(exact|fast)\Z")]


class GraphChange(TypedDict):
    """How far quantization moved the outputs of one graph, by adapter."""

    max_error: Errors
    max_relative: Errors


class CalibrationReport(TypedDict):
    """What was looked at of the user's rows."""

    rows: Annotated[int, Meta(ge=1)]
    tokens: Annotated[int, Meta(ge=1)]


class ProductReport(TypedDict):
    """What a search gave one product: its bits, and the share of the outputs that they move."""

    bits: Literal[2, 4, 8]
    error: Annotated[float, Meta(ge=0)]


class CompensationReport(TypedDict):
    """The rank of the correction, at how many sites, and the root of the share of their squared errors that
    it leaves.
    """

    rank: Annotated[int, Meta(ge=1)]
    sites: Annotated[int, Meta(ge=1)]
    error_left: Annotated[float, Meta(ge=0)]


class StoredReport(TypedDict):
    """Of a quantized base's weights in one format: how many the graphs hold as they are stored and how many
    as floats of the same values, why, by the number of weights, and how far the held ones are from what the
    format's decoder gives, as a share of the largest.
    """

    held: Annotated[int, Meta(ge=0)]
    dequantized: Annotated[int, Meta(ge=0)]
    reasons: Annotated[
        Mapping[Annotated[str, Meta(max_length=400)], Annotated[int, Meta(ge=1)]], Meta(max_length=1000)
    ]
    difference: Annotated[float, Meta(ge=0)]


class QuantizationReport(TypedDict):
    """How the graphs were quantized, and how far that moved their outputs, by adapter; ``graphs`` where there
    are several.

    ``error_by_accuracy`` is that of both accuracies, root mean square as a share of the outputs'; the other
    errors are those of ``accuracy``. Bundles without these fields are exact, and their ``head`` has the
    scheme or is float. Schemes that have no codes have neither blocks nor a head of their own. ``stored`` is
    what became of a base that was quantized before it was exported.
    """

    scheme: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,63}\Z")]
    block_size: NotRequired[Annotated[int, Meta(ge=1)]]
    quantized: Annotated[int, Meta(ge=0)]
    max_error: Errors
    label_agreement: Mapping[str, Annotated[float, Meta(ge=0, le=1)]]
    graphs: NotRequired[Mapping[str, GraphChange]]
    accuracy: NotRequired[Accuracy]
    head: NotRequired[Literal["int8", "int4", "float"]]
    symmetric: NotRequired[bool]
    algorithm: NotRequired[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,63}\Z")]]
    calibration: NotRequired[CalibrationReport]
    products: NotRequired[
        Annotated[Mapping[Annotated[str, Meta(max_length=512)], ProductReport], Meta(max_length=50_000)]
    ]
    compensation: NotRequired[CompensationReport]
    stored: NotRequired[
        Annotated[Mapping[Annotated[str, Meta(max_length=100)], StoredReport], Meta(max_length=1000)]
    ]
    error_by_accuracy: NotRequired[Mapping[Accuracy, Annotated[float, Meta(ge=0)]]]


class ReplayedCanary(TypedDict):
    """The largest error of a canary, and the one that was allowed."""

    max_abs: Annotated[float, Meta(ge=0)]
    tolerance: Annotated[float, Meta(ge=0)]


class CanaryReport(TypedDict):
    """The canaries by the names of their packs: what they gave, why they were not replayed, and how far
    quantization moved them.
    """

    replayed: Mapping[str, ReplayedCanary]
    not_replayed: Mapping[str, Annotated[str, Meta(max_length=400)]]
    moved: NotRequired[Errors]


class CacheReport(TypedDict):
    """By how much keys and values in this type move the logits of the engine's graph: the largest change as a
    share of the largest logit, its root mean square as a share of theirs, and how often the likeliest token
    is the same. Not measured yet: of a float graph that is quantized next.
    """

    type: Literal["int8"]
    max_relative: NotRequired[Annotated[float, Meta(ge=0)]]
    relative: NotRequired[Annotated[float, Meta(ge=0)]]
    label_agreement: NotRequired[Annotated[float, Meta(ge=0, le=1)]]


class DecoderReport(TypedDict):
    """How near the engine's graph is to the ordinary one, after so many steps, and its caches where they are
    not of the graph's float type; or why the bundle has none.
    """

    left_out: NotRequired[Annotated[str, Meta(max_length=400)]]
    max_relative: NotRequired[Annotated[float, Meta(ge=0)]]
    steps: NotRequired[Annotated[int, Meta(ge=0)]]
    cache: NotRequired[CacheReport]
