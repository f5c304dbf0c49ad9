"""Runs the graphs of a task one after another: each reads inputs of the caller and outputs of those before
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..bundle.manifest import ADAPTER_IDS
from ..errors import ConfigError
from ..tasks.session import Arrays
from ..tasks.task import Part
from .adapters.mix import Names
from .adapters.pinned import PinnedRows
from .media.image_rows import features_of_rows, rows_of_images
from .model_inputs import complete
from .open_bundle import OpenBundle
from .ort.values import BFLOAT16, array_of, value_of


def run_parts(
    session: OpenBundle,
    inputs: Mapping[str, np.ndarray],
    adapters: Names = None,
    pinned: PinnedRows | None = None,
    parts: Sequence[Part] | None = None,
) -> Arrays:
    """Every output of the parts that ran, in order; a part runs if its first input is there and its outputs
    are not.

    ``pinned`` are rows that have begun, in place of ``adapters``; ``parts`` takes the place of all of the
    task's.

    Raises:
        ConfigError: a missing or unknown input.
    """
    given = session.task.parts if parts is None else parts
    arrays = _check_inputs(session, inputs, given)
    running = [
        part
        for part in given
        if part.inputs[0] in arrays and not arrays.keys() >= set(session.graphs[part.name].outputs)
    ]
    if not running:
        raise ConfigError(
            "inputs are missing",
            expected=" or ".join(part.inputs[0] for part in session.task.parts),
            found=", ".join(inputs) or "nothing",
        )
    batch = pinned or session.pin(
        session.names(adapters, max(_rows(session, part, arrays) for part in running))
    )
    results = Arrays()
    for part in running:
        rows = _places(session, part, arrays)
        run = batch.of(rows)
        feeds = values(complete(session, part, arrays, run))
        outputs = {name: wide(array_of(value)) for name, value in run(feeds, part.name).items()}
        if "image_features" in outputs:
            outputs = {
                name: features_of_rows(array, rows, len(batch.names)) for name, array in outputs.items()
            }
        arrays |= outputs
        results |= outputs
    return results


def values(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as feeds."""
    return {name: value_of(np.ascontiguousarray(array)) for name, array in arrays.items()}


def wide(array: np.ndarray) -> np.ndarray:
    """What a graph gives in 16 bits, in float32: the same numbers, with room for what is computed of them."""
    return array.astype(np.float32) if array.dtype in (np.float16, BFLOAT16) else array


def _check_inputs(session: OpenBundle, inputs: Mapping[str, np.ndarray], parts: Sequence[Part]) -> Arrays:
    """The inputs, if they are those of the parts, or of others, whose graphs are not opened for that."""
    values = {
        name: value
        for part in parts
        for graph in [session.graphs[part.name]]
        for name, value in (*graph.inputs.items(), *graph.optional.items())
    }
    wanted = {
        *values,
        *(name for part in session.task.parts if part not in parts for name in part.inputs),
    } - {ADAPTER_IDS}
    unknown = sorted(set(inputs) - wanted)
    if unknown:
        raise ConfigError(
            "inputs that the graph does not take",
            expected=", ".join(sorted(wanted)),
            found=", ".join(unknown),
            remedy="name adapters with adapters=" if ADAPTER_IDS in unknown else None,
        )
    for name in session.task.inputs:
        array, value = inputs.get(name), values.get(name)
        if array is not None and value is not None and (array.ndim != len(value.shape) or 0 in array.shape):
            raise ConfigError(
                "an input has another form than the graph takes",
                where=name,
                found=array.shape,
                expected=f"{len(value.shape)} axes, of which none is empty",
            )
    return dict(inputs)


def _has_images_of_texts(session: OpenBundle, part: Part, arrays: Mapping[str, np.ndarray]) -> bool:
    return "image_features" in session.graphs[part.name].outputs and "input_ids" in arrays


def _rows(session: OpenBundle, part: Part, arrays: Mapping[str, np.ndarray]) -> int:
    """How many rows of the batch a part has; images of texts have the rows of the texts."""
    return len(arrays["input_ids" if _has_images_of_texts(session, part, arrays) else part.inputs[0]])


def _places(session: OpenBundle, part: Part, arrays: Mapping[str, np.ndarray]) -> list[int]:
    """Which of the batch's rows each row of a part is: images are those of the rows that have their
    tokens.
    """
    rows = arrays[part.inputs[0]].shape[0]
    if _has_images_of_texts(session, part, arrays):
        return rows_of_images(arrays["input_ids"], session.image_token, rows)
    return list(range(rows))
