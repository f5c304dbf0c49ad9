"""Measures how far quantization moves the outputs of a bundle's graphs: the same inputs before and after, for
the base and every adapter, graph by graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ...adapter_methods import Tensors
from ...errors import ParityError
from ...io import Json
from ...pack import canary
from ...runtime import Session, last_places, pad
from ...runtime.sessions.measured_texts import texts, vocabulary
from ...slots import NONE_BELOW
from ...tasks import MAIN, SOUNDS, Arrays

_SAMPLE = 65521
"""How many numbers of an output to compare for graphs before the last one: an encoder's keys and values can
be gigabytes.
"""

_OPEN = 4000
"""The extent of a sound that may have any length."""


class MeasuredOutputs(NamedTuple):
    """The outputs of the graphs for one adapter: those of the last graph at the last position ``[rows,
    width]``, and a sample of each earlier graph's.
    """

    last: np.ndarray
    before: Tensors

    @property
    def parts(self) -> Arrays:
        """Returns every graph's numbers by its name."""
        return {**self.before, MAIN: self.last}


def answers(session: Session) -> dict[str, MeasuredOutputs]:
    """Returns the outputs of the base and every adapter for :func:`inputs_of`, by the adapter's name."""
    batch = inputs_of(session)
    # A folded bundle has no adapters to choose: its only outputs are those with the folded packs.
    kinds: dict[str, str | None] = {"+".join(session.packs) or "base": None}
    if session.bundle.mode != "folded":
        kinds = {"base": None, **{name: name for name in session.adapters}}
    answer_by_adapter = {}
    for key, name in kinds.items():
        outputs = session.run(batch, name)
        before = {
            part: np.concatenate([_sample(outputs[output]) for output in session.graph(part).outputs])
            for part in session.bundle.parts
            if part != MAIN
        }
        answer_by_adapter[key] = MeasuredOutputs(_last(session, batch, outputs), before)
    return answer_by_adapter


def report(before: Mapping[str, MeasuredOutputs], after: Mapping[str, MeasuredOutputs]) -> Json:
    """Returns the manifest's entry on the change: the largest error and the agreement of labels by adapter;
    for several graphs, by graph too.

    Example:
        >>> one, two = (MeasuredOutputs(np.array([[1.0, last]]), {}) for last in (4.0, 3.5))
        >>> report({"base": one}, {"base": two})
        {'max_error': {'base': 0.5}, 'label_agreement': {'base': 1.0}}
    """
    entry: Json = {
        "max_error": {key: _error(before[key].last, after[key].last) for key in before},
        "label_agreement": {
            key: float((after[key].last.argmax(-1) == before[key].last.argmax(-1)).mean()) for key in before
        },
    }
    parts = list(next(iter(before.values())).parts)
    if len(parts) > 1:
        entry["graphs"] = {
            part: _of_part({key: (before[key].parts[part], after[key].parts[part]) for key in before})
            for part in parts
        }
    return entry


def relative(before: Mapping[str, MeasuredOutputs], after: Mapping[str, MeasuredOutputs]) -> float:
    """Returns the root mean square of the change of the last graph's outputs over all adapters, as a share of
    that of the outputs.

    Example:
        >>> one, two = ({"base": MeasuredOutputs(np.array([[3.0, last]]), {})} for last in (4.0, 3.0))
        >>> relative(one, two)
        0.2
    """
    change = size = 0.0
    for key, answer in before.items():
        kept = answer.last > NONE_BELOW
        exact = answer.last[kept].astype(np.float64)
        other = after[key].last[kept].astype(np.float64)
        change += float(np.sum(np.square(other - exact)))
        size += float(np.sum(np.square(exact)))
    return math.sqrt(change / size) if size else 0.0


def worst(before: Mapping[str, MeasuredOutputs], after: Mapping[str, MeasuredOutputs]) -> float:
    """Returns the largest change of any graph's outputs, as a share of that graph's largest output.

    Example:
        >>> one, two = ({"base": MeasuredOutputs(np.array([[3.0, last]]), {})} for last in (4.0, 3.0))
        >>> worst(one, two)
        0.25
    """
    return max(change for change, _ in _changes(before, after))


def require_small(
    before: Mapping[str, MeasuredOutputs], after: Mapping[str, MeasuredOutputs], tolerance: float, where: str
) -> None:
    """Checks that no graph's outputs moved by more than the share ``tolerance`` of the largest.

    Raises:
        ParityError: the outputs of a graph did.
    """
    for change, graph in _changes(before, after):
        if not change <= tolerance:
            raise ParityError(
                "quantization moves the outputs too far",
                where=f"{where}, {graph}",
                expected=f"at most {tolerance:.2g} of the largest",
                found=f"{change:.2g}",
                remedy="quantize to int8, or keep the float graph",
            )


def _changes(
    before: Mapping[str, MeasuredOutputs], after: Mapping[str, MeasuredOutputs]
) -> Iterator[tuple[float, str]]:
    """Returns by graph and adapter the largest change as a share of the largest output, and their names."""
    for key, answer in before.items():
        for part, numbers in answer.parts.items():
            yield (
                _error(numbers, after[key].parts[part]) / max(_largest(numbers), 1e-30),
                f"{key}, {part}.onnx",
            )


def inputs_of(session: Session) -> Arrays:
    """Creates pseudo-random inputs in the forms that the task takes: the canary's ids, and images or features
    of the graph's shapes; with a text, an image in every row.
    """
    rng = np.random.default_rng(canary.SEED)
    rows = len(canary.LENGTHS)
    inputs = {}
    shapes = {
        name: value.shape
        for graph in map(session.graph, session.bundle.parts)
        for name, value in graph.inputs.items()
    }
    images = []
    if "image_features" in session.task.main.inputs:
        inputs = session.image_layout.example(rows, rng)
        images = session.image_lengths(inputs)
    for name in [name for name in session.task.inputs if name not in inputs]:
        if name == "input_ids":
            inputs |= pad(texts(session, images), 0, left=session.pads_left)
        elif name == "decoder_input_ids":
            inputs[name] = rng.integers(1, vocabulary(session.folder), (rows, 4))
        elif name in {"pixel_values", *SOUNDS} and name in shapes:
            extents = [extent if isinstance(extent, int) else _OPEN for extent in shapes[name][1:]]
            inputs[name] = rng.standard_normal((rows, *extents)).astype(np.float32)
    if session.task.example is None:
        return inputs
    # imports transformers, which only tasks with such inputs need
    from ...torch_adapters.models.load import load_config  # noqa: PLC0415

    return {**inputs, **session.task.example(load_config(session.folder), inputs, rng)}


def _last(session: Session, batch: Arrays, outputs: Arrays) -> np.ndarray:
    """Returns the outputs of the last graph at each row's last position: its logits, or its first output."""
    output = outputs["logits"] if "logits" in outputs else outputs[session.graph(MAIN).outputs[0]]
    if output.ndim == 3:
        last = (
            last_places(batch["attention_mask"])
            if "input_ids" in session.task.main.inputs
            else output.shape[1] - 1
        )
        output = output[range(len(output)), last if session.task.generates else 0]
    return output


def _of_part(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, float]]:
    errors = {key: _error(*pair) for key, pair in pairs.items()}
    return {
        "max_error": errors,
        "max_relative": {key: error / max(_largest(pairs[key][0]), 1e-30) for key, error in errors.items()},
    }


def _error(before: np.ndarray, after: np.ndarray) -> float:
    return float(np.abs(after - before).max())


def _largest(numbers: np.ndarray) -> float:
    """Returns the largest magnitude, ignoring the outputs of labels that an adapter does not have."""
    return float(np.abs(numbers[numbers > NONE_BELOW]).max())


def _sample(output: np.ndarray) -> np.ndarray:
    flat = output.ravel()
    return flat[np.linspace(0, flat.size - 1, min(flat.size, _SAMPLE)).astype(np.int64)].astype(np.float32)
