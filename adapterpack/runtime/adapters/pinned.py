"""Pins the adapters of a batch: rows run to their end with the adapters with which they began, whatever the
session loads or unloads meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...adapter_methods import Tensors
from ...bundle import ENCODED
from ...pack import Pack
from ...slots import ABSENT, convert, virtual_tokens
from ...tasks import MAIN
from ..ort import HOST, Memory, array_of, empty, fill
from .prompt_cache import PromptCache, Prompts, make_prompt_cache, prompt_lengths, split_by_length


class Adapters(NamedTuple):
    """An immutable snapshot of the adapters of a session: its packs and the keys and values of their prompts,
    by name, and the state of the bundle's mode. A session that loads or unloads an adapter replaces its
    snapshot.
    """

    packs: Mapping[str, Pack]
    prompts: Prompts
    attached: Any


class RunRows(Protocol):
    """Runs a graph on rows: maps feeds to outputs, both by name and as ``OrtValue``."""

    def __call__(
        self, feeds: Mapping[str, Any], part: str = MAIN, rows: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Runs one pass of a part. ``rows`` are the indices of these rows among the pinned names; by default
        the batch has all of them, in order.
        """
        ...


class PinnedRows(NamedTuple):
    """The rows of a batch and their adapters, one name a row, None for the base. Calling it runs one pass."""

    names: Sequence[str | None]
    adapters: Adapters
    run: RunRows

    def __call__(self, feeds: Mapping[str, Any], part: str = MAIN) -> dict[str, Any]:
        """Runs one pass of a part and returns its outputs. A decoder with cross-attention has no mask for its
        own cache, so rows whose prompts have different lengths run in separate passes.
        """
        lengths = self.in_cache() if self.adapters.prompts else []
        if len(set(lengths)) < 2 or not any(name.startswith(ENCODED) for name in feeds):
            return self.run(feeds, part)
        return join_passes(
            (rows, self.run(some, part, list(rows))) for rows, some in split_by_length(feeds, lengths)
        )

    def in_cache(self) -> list[int]:
        """Returns how many positions of the cache the prompt of each row takes."""
        return prompt_lengths(self.adapters.prompts, self.names)

    def of(self, places: Sequence[int]) -> PinnedRows:
        """Returns the rows at these indices, in this order; an index may occur several times."""

        def run(
            feeds: Mapping[str, Any], part: str = MAIN, rows: Sequence[int] | None = None
        ) -> dict[str, Any]:
            return self.run(feeds, part, places if rows is None else [places[row] for row in rows])

        return PinnedRows([self.names[place] for place in places], self.adapters, run)

    def prefix(self, inputs: Mapping[str, Any]) -> PromptCache:
        """Returns the cache with which the rows begin in a graph with these inputs, and its mask: the keys
        and values of their prompts, or none.
        """
        return make_prompt_cache(inputs, self.adapters.prompts, self.names)

    def virtual(self) -> np.ndarray:
        """Returns the number of virtual tokens of each row's prompt, ``[rows]``."""
        return np.array(
            [0 if name is None else virtual_tokens(self.adapters.packs[name]) for name in self.names],
            np.int64,
        )

    def acting(self, inputs: Tensors, before: np.ndarray | None = None) -> np.ndarray:
        """Returns the positions at which each row's adapter acts in a pass, ``[batch, tokens]`` bool. Most
        adapters act everywhere.

        ``inputs`` holds the ``input_ids`` of the pass and the ``attention_mask`` of these tokens. In a pass
        on a cache, ``before`` ``[batch]`` says in which rows the adapter has acted already.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        positions = np.ones(ids.shape, bool)
        for name in {name for name in self.names if name is not None}:
            acts = self.adapters.packs[name].acts
            if acts is not None:
                rows = np.flatnonzero([other == name for other in self.names])
                real = mask[rows] > 0
                positions[rows] = acts.mask(ids[rows], real, real, None if before is None else before[rows])
        return positions


def join_passes(passes: Iterable[tuple[np.ndarray, Mapping[str, Any]]]) -> dict[str, Any]:
    """Joins the outputs of passes over some rows of a batch each, given with the indices of those rows."""
    pieces: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for rows, outputs in passes:
        for key, value in outputs.items():
            pieces.setdefault(key, []).append((rows, array_of(value)))
    return {key: owning(_join_rows(parts)) for key, parts in pieces.items()}


def _join_rows(pieces: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Puts the rows of several passes back into their order. Narrower logits are padded with the logit of an
    absent label, and shorter keys and values ``[rows, heads, length, width]`` with zeros that the mask hides.
    """
    first = pieces[0][1]
    shape = np.max([array.shape[1:] for _, array in pieces], axis=0, initial=0)
    total = sum(len(rows) for rows, _ in pieces)
    absent = 0 if first.ndim == 4 else convert(np.array(ABSENT), first.dtype.name, "logits")
    whole = np.full((total, *shape), absent, first.dtype)
    for rows, array in pieces:
        place: tuple[Any, ...] = (rows, *(slice(extent) for extent in array.shape[1:]))
        whole[place] = array
    return whole


def owning(array: np.ndarray, memory: Memory = HOST) -> Any:
    """Copies an array into an ``OrtValue`` that owns its memory. A value made directly from an array only
    borrows the memory of that array.
    """
    value = empty(array.shape, array.dtype, memory)
    fill(value, array)
    return value
