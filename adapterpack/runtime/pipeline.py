"""Runs the graphs of a task in order; each reads inputs of the caller and outputs of earlier graphs, and the
masks, position ids, empty caches and prompts of adapters that the caller leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..adapter_methods import PROMPT, Tensors
from ..bundle import ADAPTER_IDS, ADAPTER_POSITIONS, ENCODED, past_length
from ..errors import ConfigError
from ..slots import virtual_room
from ..tasks import SOUNDS, Arrays, Part
from .adapters import Names, PinnedRows, PromptCache, make_prompt_cache
from .media import IMAGES, OFFSETS, PIXELS, TOKEN_TYPES, features_of_rows, rows_of_images
from .open_bundle import OpenBundle
from .ort import BFLOAT16, OrtModel, array_of, value_of
from .padding import last_places, positions
from .text import require_context


def run_parts(
    session: OpenBundle,
    inputs: Tensors,
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
        if part.first(arrays) in arrays and not arrays.keys() >= set(session.graph(part.name).outputs)
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
        if _reads_images(session, part):
            outputs = _run_images(session, part, arrays, batch)
        else:
            run = batch.of(range(len(arrays[part.first(arrays)])))
            feeds = values(complete(session, part, arrays, run))
            outputs = {name: wide(array_of(value)) for name, value in run(feeds, part.name).items()}
        arrays |= outputs
        results |= outputs
    return results


def _run_images(session: OpenBundle, part: Part, arrays: Arrays, batch: PinnedRows) -> Arrays:
    """Runs the vision part, and returns ``image_features`` by row and what else the decoder reads of images;
    without texts each image is a row.
    """
    layout = session.image_layout
    given = layout.whole({name: arrays[name] for name in IMAGES if name in arrays})
    lengths = layout.lengths(given)
    ids = arrays.get("input_ids")
    rows = list(range(len(lengths))) if ids is None else rows_of_images(ids, session.image_token, lengths)
    outputs = []
    for feeds, images in layout.passes(given):
        run = batch.of([rows[image] for image in images])
        found = run(values(complete(session, part, feeds, run)), part.name)
        outputs.append(wide(array_of(found["image_features"])))
    by_row = {"image_features": features_of_rows(layout.features(outputs, given), rows, len(batch.names))}
    if ids is None:
        return by_row
    mask = arrays.get("attention_mask", np.ones_like(ids))
    offsets = layout.offsets(ids, mask, session.image_token, given)
    return by_row if offsets is None else {**by_row, OFFSETS: offsets}


def values(arrays: Tensors) -> dict[str, Any]:
    """Converts arrays to feeds."""
    return {name: value_of(np.ascontiguousarray(array)) for name, array in arrays.items()}


def wide(array: np.ndarray) -> np.ndarray:
    """Converts 16-bit outputs to float32: the same values, with more precision for later computations."""
    return array.astype(np.float32) if array.dtype in (np.float16, BFLOAT16) else array


def _check_inputs(session: OpenBundle, inputs: Tensors, parts: Sequence[Part]) -> Arrays:
    """Checks that the caller's inputs belong to these parts or to other parts of the task, without opening
    the graphs of the latter.
    """
    values = {
        name: value
        for part in parts
        for graph in [session.graph(part.name)]
        for name, value in (*graph.inputs.items(), *graph.optional.items())
    }
    wanted = {
        *values,
        *(name for part in session.task.parts if part not in parts for name in part.inputs),
    } - {ADAPTER_IDS}
    unknown = sorted(set(inputs) - wanted - {*(IMAGES if PIXELS in wanted else ())})
    if unknown:
        raise ConfigError(
            "inputs that the graph does not take",
            expected=", ".join(sorted(wanted)),
            found=", ".join(unknown),
            remedy="name adapters with adapters=" if ADAPTER_IDS in unknown else None,
        )
    for name in session.task.inputs:
        array, value = inputs.get(name), values.get(name)
        forms = {len(value.shape)} if value is not None else set()
        if name == PIXELS:  # tiles of images, or patches of several
            forms.add(3 if "pixel_position_ids" in values else 5)
        if array is not None and value is not None and (array.ndim not in forms or 0 in array.shape):
            raise ConfigError(
                "an input has another form than the graph takes",
                where=name,
                found=array.shape,
                expected=f"{len(value.shape)} axes, of which none is empty",
            )
    return dict(inputs)


def _reads_images(session: OpenBundle, part: Part) -> bool:
    """Whether a part makes features of images for texts."""
    return "image_features" in session.graph(part.name).outputs


def _rows(session: OpenBundle, part: Part, arrays: Arrays) -> int:
    """Returns the number of batch rows of a part. Images within texts have the rows of the texts."""
    if not _reads_images(session, part):
        return len(arrays[part.first(arrays)])
    if "input_ids" in arrays:
        return len(arrays["input_ids"])
    return len(session.image_lengths({name: arrays[name] for name in IMAGES if name in arrays}))


def complete(session: OpenBundle, part: Part, known: Tensors, rows: PinnedRows) -> Arrays:
    """Returns the feeds of one part for these rows, from the inputs of the caller and the outputs of earlier
    parts.

    Raises:
        ConfigError: an input is missing, or a mask has the wrong shape.
    """
    graph = session.graph(part.name)
    wanted = set(graph.inputs) - {ADAPTER_IDS}
    fill = (
        _plain if "past_key_values" not in part.inputs else _cross if "encoder" in part.inputs else _decoder
    )
    taken = wanted | set(graph.optional)
    feeds = fill(session, graph, {name: array for name, array in known.items() if name in taken}, rows)
    missing = sorted(wanted - set(feeds))
    if missing:
        raise ConfigError(
            "inputs are missing", expected=", ".join(missing), found=", ".join(known) or "nothing"
        )
    return {name: graph.cast(name, array) for name, array in feeds.items() if name in taken}


def _plain(session: OpenBundle, graph: OrtModel, given: Arrays, rows: PinnedRows) -> Arrays:
    """Completes the inputs of a graph without a cache: adds a mask and token types."""
    if "attention_mask" in graph.inputs:
        shape = next(given[name].shape[:2] for name in ("input_ids", *SOUNDS) if name in given)
        _require_mask(given.setdefault("attention_mask", np.ones(shape, np.int64)), shape)
        if "input_ids" in given:
            room = virtual_room(session.bundle.sites)
            require_context(session, last_places(given["attention_mask"]) + 1 + room, room)
    if "token_type_ids" in graph.inputs:
        given.setdefault("token_type_ids", np.zeros_like(given["input_ids"]))
    return _acting(session, graph, given, rows)


def _decoder(session: OpenBundle, graph: OrtModel, given: Arrays, rows: PinnedRows) -> Arrays:
    """Completes the inputs of a decoder: adds a mask, position ids and a cache that begins with the prompts
    of the rows' adapters.
    """
    batch, length = given["input_ids"].shape
    if "image_features" in graph.inputs:  # rows may have images
        given.setdefault(
            "image_features", np.zeros((batch, 0, graph.inputs["image_features"].shape[2]), np.float32)
        )
    if OFFSETS in graph.inputs:
        given[OFFSETS] = given.get(OFFSETS, np.zeros((batch, length, 3), np.int64))[:, :length]
    prefix = rows.prefix(session.inputs)
    for name, array in prefix.cache.items():
        given.setdefault(name, array)
    past = past_length(given)
    mask = given.get("attention_mask")
    if past is None:  # the states of all layers are of fixed size: only the mask says how much they have read
        past = 0 if mask is None else max(mask.shape[-1] - length, 0)
    if TOKEN_TYPES in graph.inputs:  # a first pass is the prompt, whose tokens see all of it
        kind = np.full((batch, length), int(past > prefix.width), np.int64)
        given.setdefault(TOKEN_TYPES, kind)
    # The caller's mask covers the row's own tokens; the prompt's positions in the cache are added below.
    own = past + length - prefix.width
    mask = np.ones((batch, own), np.int64) if mask is None else mask
    _require_mask(mask, (batch, own))
    given["attention_mask"] = covered = prefix.covering(mask)
    _require_window(session, covered, prefix)
    counted = given.get("position_ids")
    given["position_ids"] = positions(covered)[:, -length:] if counted is None else counted + prefix.lengths
    require_context(session, given["position_ids"].max(axis=1) + 1, prefix.lengths[:, 0])
    return _acting(session, graph, given, rows, past, prefix)


def _cross(session: OpenBundle, graph: OrtModel, given: Arrays, rows: PinnedRows) -> Arrays:
    """Completes the inputs of a decoder with cross-attention. Its mask covers the encoder's tokens."""
    count, length = given["decoder_input_ids"].shape
    past = past_length(given) or 0
    prompts = np.array(rows.in_cache(), np.int64)
    behind = max(past, prompts.max()) - prompts.max() + length
    require_context(session, prompts + behind, prompts)
    given = {**make_prompt_cache(graph.inputs, rows.adapters.prompts, rows.names, left=False).cache, **given}
    read = next((array.shape[2] for name, array in given.items() if name.startswith(ENCODED)), None)
    if "attention_mask" in graph.inputs and read is not None:
        virtual = rows.virtual() if PROMPT in session.bundle.sites else np.zeros(count, np.int64)
        room = (
            virtual_room(session.bundle.sites)
            if session.bundle.mode == "bank"
            else int(virtual.max(initial=0))
        )
        own = given.get("attention_mask", np.ones((count, read - room), np.int64))
        _require_mask(own, (count, read - room))
        given["attention_mask"] = _behind(virtual, own, room)
    return given


def _behind(virtual: np.ndarray, own: np.ndarray, room: int) -> np.ndarray:
    """Returns the mask of each row's virtual tokens, its own tokens, and then the padding that longer prompts
    of other rows require.

    Example:
        >>> _behind(np.array([2, 0]), np.array([[1, 1], [1, 0]]), 2).tolist()
        [[1, 1, 1, 1], [1, 0, 0, 0]]
    """
    mask = np.zeros((len(own), room + own.shape[1]), np.int64)
    for row, count in enumerate(virtual):
        mask[row, :count] = 1
        mask[row, count : count + own.shape[1]] = own[row]
    return mask


def _acting(
    session: OpenBundle,
    graph: OrtModel,
    given: Arrays,
    rows: PinnedRows,
    past: int = 0,
    prefix: PromptCache | None = None,
) -> Arrays:
    """Adds the positions at which adapters act, if the graph has an input for them."""
    if ADAPTER_POSITIONS not in graph.inputs:
        return given
    if ADAPTER_POSITIONS in given:
        return {**given, ADAPTER_POSITIONS: given[ADAPTER_POSITIONS].astype(bool)}
    on_cache = past > (prefix.width if prefix else 0)
    acts = (rows.adapters.packs[name].acts for name in rows.names if name is not None)
    if on_cache and any(rule is not None for rule in acts):
        raise ConfigError(
            "a pass on a cache does not show where the adapter acts",
            where=session.folder,
            expected=ADAPTER_POSITIONS,
            remedy="give it: session.acting says it for every pass in turn",
        )
    ids = given["input_ids"]
    mask = given.get("attention_mask", np.ones_like(ids))[:, -ids.shape[1] :]
    return {**given, ADAPTER_POSITIONS: rows.acting({"input_ids": ids, "attention_mask": mask})}


def _require_window(session: OpenBundle, covered: np.ndarray, prefix: PromptCache) -> None:
    """Checks that a sliding window covers prompt and tokens. Padding between them counts as positions, so the
    prompt would leave the window earlier than without padding.
    """
    window = session.config.get("sliding_window")
    used = session.config.get("use_sliding_window", True)
    if prefix.width and used and isinstance(window, int) and covered.shape[1] > window and not covered.all():
        raise ConfigError(
            "padding comes between a row's prompt and its tokens, beyond the model's sliding window",
            where=session.folder,
            expected=f"at most {window} positions, or rows of one length",
            found=covered.shape[1],
            remedy="run these rows apart",
        )


def _require_mask(mask: np.ndarray, shape: tuple[int, ...]) -> None:
    if mask.shape != shape:
        raise ConfigError(
            "attention_mask must cover every token, those in the cache too", expected=shape, found=mask.shape
        )
