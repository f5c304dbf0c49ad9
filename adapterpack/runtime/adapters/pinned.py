"""Rows of a batch with the adapters that they began with, whatever a session loads or unloads meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ...bundle.manifest import ENCODED
from ...pack.pack import Pack
from ...slots.prompt_rows import virtual_tokens
from ...tasks.task import MAIN
from ..ort.values import array_of
from .positions import acting
from .prompt_cache import PromptCache, Prompts, make_prompt_cache, prompt_lengths, split_by_length
from .rows_apart import join_rows, owning


class Adapters(NamedTuple):
    """The adapters of a session at one moment: its packs and what their prompts put into a cache, by name,
    and what the bundle's mode needs to run them. Never changed in place: a session that loads or unloads one
    puts another value here.
    """

    packs: Mapping[str, Pack]
    prompts: Prompts
    attached: Any


class RunRows(Protocol):
    """Feeds to outputs, both by name and as ``OrtValue``."""

    def __call__(
        self, feeds: Mapping[str, Any], part: str = MAIN, rows: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """One pass of a part; ``rows`` are the places among the pinned names that its rows have, by default
        all in order.
        """
        ...


class PinnedRows(NamedTuple):
    """Rows with these adapters, one name a row, None for the base; called, it runs one pass of them."""

    names: Sequence[str | None]
    adapters: Adapters
    run: RunRows

    def __call__(self, feeds: Mapping[str, Any], part: str = MAIN) -> dict[str, Any]:
        """The outputs of one pass of a part. A decoder behind an encoder has no mask for its own cache: rows
        whose prompts in it are of different lengths run apart.
        """
        lengths = self.in_cache() if self.adapters.prompts else []
        if len(set(lengths)) < 2 or not any(name.startswith(ENCODED) for name in feeds):
            return self.run(feeds, part)
        pieces: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for rows, some in split_by_length(feeds, lengths):
            for key, value in self.run(some, part, list(rows)).items():
                pieces.setdefault(key, []).append((rows, array_of(value)))
        return {key: owning(join_rows(parts)) for key, parts in pieces.items()}

    def in_cache(self) -> list[int]:
        """How much of a cache each row's prompt takes."""
        return prompt_lengths(self.adapters.prompts, self.names)

    def of(self, places: Sequence[int]) -> PinnedRows:
        """The rows at these places, in that order; one may be there several times."""

        def run(
            feeds: Mapping[str, Any], part: str = MAIN, rows: Sequence[int] | None = None
        ) -> dict[str, Any]:
            return self.run(feeds, part, places if rows is None else [places[row] for row in rows])

        return PinnedRows([self.names[place] for place in places], self.adapters, run)

    def prefix(self, inputs: Mapping[str, Any]) -> PromptCache:
        """The cache that the rows begin with in a graph with these inputs: their prompts, or nothing; and the
        mask that covers it.
        """
        return make_prompt_cache(inputs, self.adapters.prompts, self.names)

    def virtual(self) -> np.ndarray:
        """How many virtual tokens each row's prompt has, ``[rows]``."""
        return np.array(
            [0 if name is None else virtual_tokens(self.adapters.packs[name]) for name in self.names],
            np.int64,
        )

    def acting(self, inputs: Mapping[str, np.ndarray], before: np.ndarray | None = None) -> np.ndarray:
        """At which positions each row's adapter acts in a pass: ``[batch, tokens]`` bool, True everywhere for
        most adapters.

        ``inputs`` are the pass's ``input_ids`` and the ``attention_mask`` of these tokens; ``before``
        ``[batch]`` says, of a pass on a cache, in which rows the adapter has acted so far.
        """
        rules = {name: pack.acts for name, pack in self.adapters.packs.items()}
        return acting(rules, self.names, inputs["input_ids"], inputs["attention_mask"], before)

    def acts_in_parts(self) -> bool:
        """Whether the adapter of a row acts at some of its positions only."""
        return any(name is not None and self.adapters.packs[name].acts is not None for name in self.names)
