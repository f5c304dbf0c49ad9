"""Forms batches of encoder rows: rows of about one length go together, so that little of a pass is spent on
padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from ...pack.pack import Pack
from ...tasks.one_pass import PreparedRow
from ...tasks.session import Arrays, RowHead
from ...tasks.task import AXES
from ..adapters.mix import Mix
from .adapter_feeds import ResidentAdapter

LOOK_AHEAD = 1024
"""How many of the rows that wait are looked at for one batch."""


@dataclass(eq=False)
class EncoderRow:
    """One request. What it needs is held here, and never looked up again by a name."""

    number: int
    prepared: PreparedRow
    options: Any
    head: RowHead
    pack: Pack | Mix | None
    adapter: ResidentAdapter | None

    @property
    def digest(self) -> str | None:
        """The digest of its adapter."""
        return None if self.adapter is None else self.adapter.digest

    @cached_property
    def length(self) -> int:
        """How many positions it takes in a pass; an image counts as one."""
        return max(1, self.prepared.tokens)

    @cached_property
    def form(self) -> tuple[Any, ...]:
        """What rows of one batch have in common: their inputs, and every extent of these but the number of
        tokens.
        """
        return tuple(
            (name, array.shape[2 if _along_tokens(name) else 1 :])
            for name, array in sorted(self.prepared.inputs.items())
        )


@dataclass
class Padding:
    """What the passes so far were spent on: ``tokens`` of rows, and positions of ``padding`` behind shorter
    rows.
    """

    passes: int = 0
    rows: int = 0
    tokens: int = 0
    padding: int = 0

    def count(self, rows: Sequence[EncoderRow]) -> None:
        """Counts one pass."""
        lengths = [row.length for row in rows]
        self.passes += 1
        self.rows += len(rows)
        self.tokens += sum(lengths)
        self.padding += max(lengths) * len(rows) - sum(lengths)

    @property
    def share(self) -> float:
        """The share of all positions that was padding."""
        return self.padding / max(1, self.tokens + self.padding)


@dataclass(frozen=True)
class Bounds:
    """What one batch has at most: ``rows``; ``tokens``, padding included; and the share ``padding`` of
    these.
    """

    rows: int
    tokens: int
    padding: float

    def allow(self, count: int, longest: int, tokens: int) -> bool:
        """Whether so many rows with so many tokens of their own, padded to the longest, are within the
        bounds.
        """
        positions = count * longest
        return (
            count <= self.rows and positions <= self.tokens and positions - tokens <= self.padding * positions
        )


def next_batch(
    waiting: Iterable[EncoderRow], bounds: Bounds, fit: Callable[[Collection[ResidentAdapter | None]], bool]
) -> list[EncoderRow]:
    """The row that has waited longest, and with it rows of about its length, the nearest first, whose
    adapters ``fit`` together. No row waits for more than those before it; one that is longer than the bounds
    runs by itself.
    """
    rows = list(islice(waiting, LOOK_AHEAD))
    oldest = rows[0]
    batch, adapters, longest, tokens = [oldest], {oldest.adapter}, oldest.length, oldest.length
    for row in sorted(
        (row for row in rows[1:] if row.form == oldest.form), key=lambda row: abs(row.length - oldest.length)
    ):
        if len(batch) == bounds.rows:
            break
        if not bounds.allow(len(batch) + 1, max(longest, row.length), tokens + row.length):
            continue
        if row.adapter not in adapters and not fit({*adapters, row.adapter}):
            continue
        batch.append(row)
        adapters.add(row.adapter)
        longest, tokens = max(longest, row.length), tokens + row.length
    return batch


def collate(rows: Sequence[Mapping[str, np.ndarray]], pad_id: int) -> Arrays:
    """Inputs ``[1, ...]`` of rows of one form as one batch, padded on the right behind their tokens.

    Example:
        >>> short, long = ({"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)),
        ...     int)} for ids in ([7], [8, 9]))
        >>> {name: array.tolist() for name, array in collate([short, long], 0).items()}
        {'input_ids': [[7, 0], [8, 9]], 'attention_mask': [[1, 0], [1, 1]]}
    """
    return {
        name: _stack([row[name] for row in rows], pad_id if name == "input_ids" else 0)
        if _along_tokens(name)
        else np.concatenate([row[name] for row in rows])
        for name in rows[0]
    }


def _stack(arrays: Sequence[np.ndarray], fill: int) -> np.ndarray:
    stacked = np.full(
        (len(arrays), max(array.shape[1] for array in arrays), *arrays[0].shape[2:]), fill, arrays[0].dtype
    )
    for place, array in enumerate(arrays):
        stacked[place, : array.shape[1]] = array[0]
    return stacked


def _along_tokens(name: str) -> bool:
    return AXES.get(name, ())[1:2] == ("sequence",)
