"""The reports in a bundle's manifest: on quantization, replayed canaries and the engine's graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NotRequired, TypedDict

from msgspec import Meta

from ..io import NonNegative, PositiveWhole, Whole

Errors = Mapping[str, NonNegative]
# a schema leaves out a Literal that is a key, by msgspec's version
Accuracy = Annotated[str, Meta(pattern=r"^(exact|fast)\Z")]


PROOFS = ("full", "layers", "none")
"""How much an export proves: every row and adapter on the whole model; every kind of layer at full width, and
the whole on short rows with a sample of adapters; or nothing.
"""


class ProofReport(TypedDict):
    """How much of a bundle was proved against torch. By layers: how many layers ``of`` all of them, with the
    first ``adapters`` sampled; and whether the ``whole`` graph was compared with torch on short rows, or only
    the places of its weights with the checkpoint, ``placed`` of them. The errors are then those of the few
    layers where the whole was not compared.
    """

    depth: Annotated[str, Meta(pattern=rf"^({'|'.join(PROOFS)})\Z")]
    layers: NotRequired[PositiveWhole]
    of: NotRequired[PositiveWhole]
    adapters: NotRequired[Annotated[list[str], Meta(max_length=4096)]]
    whole: NotRequired[Literal["torch", "places"]]
    placed: NotRequired[Whole]


def proof_sentence(report: ProofReport, adapters: int) -> str:
    """Describes how much of a bundle with so many adapters was proved.

    Example:
        >>> proof_sentence({"depth": "none"}, 2)
        'NOT PROVED: whether the graphs compute the model is not known'
    """
    if report["depth"] == "none":
        return "NOT PROVED: whether the graphs compute the model is not known"
    if report["depth"] == "full":
        return "proved in full against torch"
    whole = (
        "the whole graph against torch on short rows"
        if report["whole"] == "torch"
        else f"of the whole graph the places of {report['placed']} weights"
    )
    return (
        f"proved by layers: {report['layers']} of {report['of']} against torch, {whole}, "
        f"{len(report['adapters'])} of {adapters} adapters"
    )


class GraphChange(TypedDict):
    """How far quantization changed the outputs of one graph, by adapter."""

    max_error: Errors
    max_relative: Errors


class CalibrationReport(TypedDict):
    """How many of the user's rows and tokens were used for calibration."""

    rows: PositiveWhole
    tokens: PositiveWhole


class ProductReport(TypedDict):
    """The result of a search for one matrix product: its bits, and its error as a share of the outputs."""

    bits: Literal[2, 4, 8]
    error: NonNegative


class CompensationReport(TypedDict):
    """The low-rank correction of a quantized graph: its rank, the number of its sites, and the root of the
    share of their squared errors that remains.
    """

    rank: PositiveWhole
    sites: PositiveWhole
    error_left: NonNegative


class StoredReport(TypedDict):
    """The weights of a quantized base in one format: how many the graphs hold in their stored form and how
    many as floats of the same values, with the reasons by number of weights, and the largest difference of
    the stored ones from the format's decoder, relative to the largest weight.
    """

    held: Whole
    dequantized: Whole
    reasons: Annotated[Mapping[Annotated[str, Meta(max_length=400)], PositiveWhole], Meta(max_length=1000)]
    difference: NonNegative


class QuantizationReport(TypedDict):
    """How the graphs were quantized, and how far that changed their outputs, by adapter; ``graphs`` if there
    are several.

    ``error_by_accuracy`` is the root mean square error of both accuracies, relative to the outputs; the other
    errors are those of ``accuracy``. Bundles without these fields are exact, and their ``head`` has the
    scheme or is float. Schemes without codes have neither blocks nor a head of their own. ``stored`` reports
    on a base that was quantized before its export. ``measured_layers``: the errors are those of a copy of so
    many layers, as no float graph of the whole model was written.
    """

    scheme: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,63}\Z")]
    block_size: NotRequired[PositiveWhole]
    quantized: Whole
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
    error_by_accuracy: NotRequired[Mapping[Accuracy, NonNegative]]
    measured_layers: NotRequired[PositiveWhole]


class ReplayedCanary(TypedDict):
    """The largest error of a canary, and its tolerance."""

    max_abs: NonNegative
    tolerance: NonNegative


class CanaryReport(TypedDict):
    """The canaries by pack name: the errors of those that were replayed, the reasons for those that were not,
    and how far quantization changed them.
    """

    replayed: Mapping[str, ReplayedCanary]
    not_replayed: Mapping[str, Annotated[str, Meta(max_length=400)]]
    moved: NotRequired[Errors]


class CacheReport(TypedDict):
    """How much keys and values in this type change the logits of the engine's graph: the largest change
    relative to the largest logit, the root mean square relative to that of the logits, and how often the most
    likely token is the same. Missing for a float graph that is still to be quantized.
    """

    type: Literal["int8"]
    max_relative: NotRequired[NonNegative]
    relative: NotRequired[NonNegative]
    label_agreement: NotRequired[Annotated[float, Meta(ge=0, le=1)]]


class DecoderReport(TypedDict):
    """The largest difference between the engine's graph and the ordinary one after so many steps, and its
    caches if they have another type than the graph; or why the bundle has no such graph.
    """

    left_out: NotRequired[Annotated[str, Meta(max_length=400)]]
    max_relative: NotRequired[NonNegative]
    steps: NotRequired[Whole]
    cache: NotRequired[CacheReport]
