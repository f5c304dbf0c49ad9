"""Runs the graphs of a task in order; each reads inputs of the caller and outputs of earlier graphs."""

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
    """Runs the parts of a task and returns all of their outputs. A part runs if its first input is present
    and its outputs are not.

    ``pinned`` are rows that have begun already, in place of ``adapters``; ``parts`` restricts the run to some
    of the task's parts.

    Raises:
        ConfigError: an input is missing or unknown.
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
    """Converts arrays to feeds."""
    return {name: value_of(np.ascontiguousarray(array)) for name, array in arrays.items()}


def wide(array: np.ndarray) -> np.ndarray:
    """Converts 16-bit outputs to float32: the same values, with more precision for later computations."""
    return array.astype(np.float32) if array.dtype in (np.float16, BFLOAT16) else array


def _check_inputs(session: OpenBundle, inputs: Mapping[str, np.ndarray], parts: Sequence[Part]) -> Arrays:
    """Checks that the caller's inputs belong to these parts or to other parts of the task, without opening
    the graphs of the latter.
    """
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
    """Returns the number of batch rows of a part. Images within texts have the rows of the texts."""
    return len(arrays["input_ids" if _has_images_of_texts(session, part, arrays) else part.inputs[0]])


def _places(session: OpenBundle, part: Part, arrays: Mapping[str, np.ndarray]) -> list[int]:
    """Returns the batch row of each row of a part. An image belongs to the row that contains its tokens."""
    rows = arrays[part.inputs[0]].shape[0]
    if _has_images_of_texts(session, part, arrays):
        return rows_of_images(arrays["input_ids"], session.image_token, rows)
    return list(range(rows))
