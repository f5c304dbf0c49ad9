"""Forms batches of encoder rows: combines rows of similar length, so that little of a pass is spent on
padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from ...adapter_methods import Tensors
from ...tasks import AXES, SOUNDS, Arrays, PreparedRow, RowHead
from .adapter_feeds import ResidentAdapter

LOOK_AHEAD = 1024
"""How many waiting rows are considered for one batch."""


@dataclass(eq=False)
class EncoderRow:
    """One request of an encoder engine. It holds its adapter itself, since names may change meanwhile."""

    number: int
    prepared: PreparedRow
    options: Any
    head: RowHead
    adapter: ResidentAdapter | None

    @property
    def digest(self) -> str | None:
        """The digest of its adapter, None for the base."""
        return None if self.adapter is None else self.adapter.digest

    @cached_property
    def length(self) -> int:
        """The number of positions that it takes in a pass; an image counts as one."""
        return max(1, self.prepared.tokens, self.prepared.positions)

    @cached_property
    def form(self) -> tuple[Any, ...]:
        """What rows of one batch must have in common: the names of their inputs and all extents other than
        the number of tokens.
        """
        return tuple(
            (name, array.shape[2 if _along_tokens(name, self.prepared.inputs) else 1 :])
            for name, array in sorted(self.prepared.inputs.items())
        )


@dataclass
class Padding:
    """Counts the positions of all passes so far: ``tokens`` of rows, and ``padding`` after shorter rows."""

    passes: int = 0
    rows: int = 0
    tokens: int = 0
    padding: int = 0

    def count(self, rows: Sequence[EncoderRow]) -> None:
        """Adds one pass over these rows."""
        lengths = [row.length for row in rows]
        self.passes += 1
        self.rows += len(rows)
        self.tokens += sum(lengths)
        self.padding += max(lengths) * len(rows) - sum(lengths)

    @property
    def share(self) -> float:
        """The share of padding among all positions."""
        return self.padding / max(1, self.tokens + self.padding)


@dataclass(frozen=True)
class Bounds:
    """The limits of one batch: at most ``rows`` rows and ``tokens`` positions with padding, of which at most
    the share ``padding`` is padding.
    """

    rows: int
    tokens: int
    padding: float

    def allow(self, count: int, longest: int, tokens: int) -> bool:
        """Returns whether ``count`` rows with ``tokens`` tokens in all, padded to the longest, keep within
        the limits.
        """
        positions = count * longest
        return (
            count <= self.rows and positions <= self.tokens and positions - tokens <= self.padding * positions
        )


def next_batch(
    waiting: Iterable[EncoderRow], bounds: Bounds, fit: Callable[[Collection[ResidentAdapter | None]], bool]
) -> list[EncoderRow]:
    """Returns the row that has waited longest, with other rows of similar length whose adapters ``fit`` into
    the batch, the most similar first. A row longer than the limits runs alone.

    Every batch contains the oldest row, so no row can be overtaken for ever.
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
        # The bank has no slot for one more adapter; rows with the adapters of this batch can still join.
        if row.adapter not in adapters and not fit({*adapters, row.adapter}):
            continue
        batch.append(row)
        adapters.add(row.adapter)
        longest, tokens = max(longest, row.length), tokens + row.length
    return batch


def collate(rows: Sequence[Tensors], pad_id: int) -> Arrays:
    """Stacks the inputs ``[1, ...]`` of rows of one form into a batch, padded on the right.

    Example:
        >>> short, long = ({"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)),
        ...     int)} for ids in ([7], [8, 9]))
        >>> {name: array.tolist() for name, array in collate([short, long], 0).items()}
        {'input_ids': [[7, 0], [8, 9]], 'attention_mask': [[1, 0], [1, 1]]}
    """
    return {
        name: _stack([row[name] for row in rows], pad_id if name == "input_ids" else 0)
        if _along_tokens(name, rows[0])
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


def _along_tokens(name: str, row: Tensors) -> bool:
    """Whether an input has one number for each token of a row, or each place of a sound with a mask."""
    heard = name in SOUNDS and "attention_mask" in row
    return heard or AXES.get(name, ())[1:2] == ("sequence",)
