"""Completes the inputs of a graph: adds masks, position ids, empty caches and the prompts of adapters where
the caller does not pass them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..adapter_methods import PROMPT
from ..bundle.manifest import ADAPTER_IDS, ADAPTER_POSITIONS, ENCODED, PAST
from ..errors import ConfigError
from ..slots.prompt_rows import virtual_room
from ..tasks.session import Arrays
from ..tasks.task import Part
from .adapters.pinned import PinnedRows
from .adapters.prompt_cache import PromptCache, cross_prompt_cache
from .open_bundle import OpenBundle
from .ort.model import OrtModel
from .text.context_length import require_context


def positions(mask: np.ndarray) -> np.ndarray:
    """Returns the position ids of a mask ``[batch, length]``, counted from the first real token, on either
    padding side.
    """
    counted: np.ndarray = np.clip(np.cumsum(mask, axis=1) - 1, 0, None).astype(np.int64)
    return counted


def pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> Arrays:
    """Pads lists of ids to ``input_ids`` and ``attention_mask`` ``[batch, longest]``, int64."""
    width = max(map(len, rows), default=0)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def last_places(mask: np.ndarray) -> np.ndarray:
    """Returns the index of each row's last real token, ``[rows]``, on either padding side."""
    found: np.ndarray = mask.shape[1] - 1 - np.argmax(mask[:, ::-1] > 0, axis=1)
    return found


def complete(session: OpenBundle, part: Part, known: Mapping[str, np.ndarray], rows: PinnedRows) -> Arrays:
    """Returns the feeds of one part for these rows, from the inputs of the caller and the outputs of earlier
    parts.

    Raises:
        ConfigError: an input is missing, or a mask has the wrong shape.
    """
    graph = session.graphs[part.name]
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
    return {name: graph.fitting(name, array) for name, array in feeds.items() if name in taken}


def _plain(session: OpenBundle, graph: OrtModel, given: Arrays, rows: PinnedRows) -> Arrays:
    """Completes the inputs of a graph without a cache: adds a mask and token types."""
    if "attention_mask" in graph.inputs:
        shape = given["input_ids"].shape
        _require_mask(given.setdefault("attention_mask", np.ones(shape, np.int64)), shape)
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
    prefix = rows.prefix(session.inputs)
    for name, array in prefix.cache.items():
        given.setdefault(name, array)
    past = next((array.shape[2] for name, array in given.items() if name.startswith(PAST)), 0)
    # The caller's mask covers the row's own tokens; the prompt's positions in the cache are added below.
    own = past + length - prefix.width
    mask = given.get("attention_mask", np.ones((batch, own), np.int64))
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
    past = next((array.shape[2] for name, array in given.items() if name.startswith(PAST)), 0)
    prompts = np.array(rows.in_cache(), np.int64)
    behind = max(past, prompts.max()) - prompts.max() + length
    require_context(session, prompts + behind, prompts)
    given = {**cross_prompt_cache(graph.inputs, rows.adapters.prompts, rows.names), **given}
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
        mask[row, :count], mask[row, count : count + own.shape[1]] = 1, own[row]
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
    if past > (prefix.width if prefix else 0) and rows.acts_in_parts():
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
    window, used = session.config.get("sliding_window"), session.config.get("use_sliding_window", True)
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
