"""Packs rows of different lengths into longer rows that are nearly full, in which each original row attends
only to itself.

A packed row has position ids that restart at 0 for each original row, and no attention mask: transformers
builds a block-diagonal mask from restarting positions. :func:`require_apart` tries before training whether
the model really does.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch

from ...errors import Unsupported
from ...tasks import IGNORED
from ...tasks.data import Row
from ...torch_adapters import evaluation_mode
from ...torch_adapters.canaries.canary import coarse
from ...torch_adapters.layers import device_of

_TRIED = 12
"""How many tokens of each of two rows the trial uses."""


def pack_sequences(rows: Sequence[Row], width: int) -> list[dict[str, Any]]:
    """Packs rows of ``input_ids`` and ``labels`` into few rows of at most ``width`` tokens, by best fit, the
    longest first.

    Example:
        >>> rows = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
        >>> pack_sequences(rows, 4)
        [{'input_ids': [1, 2, 3], 'labels': [-100, 2, -100], 'position_ids': [0, 1, 0]}]
    """
    lengths = [len(row["input_ids"]) for row in rows]
    bins: list[list[int]] = []
    # The distinct amounts of free space in bins, sorted.
    free: list[int] = []
    with_free: dict[int, list[int]] = {}
    for number in sorted(range(len(rows)), key=lambda number: -lengths[number]):
        # Best fit: the bin with the least free space that is still enough.
        at = bisect_left(free, lengths[number])
        left = free[at] if at < len(free) else width
        if at < len(free):
            place = with_free[left].pop()
            if not with_free[left]:
                free.pop(at)
        else:
            place = len(bins)
            bins.append([])
        bins[place].append(number)
        rest = left - lengths[number]
        if not with_free.setdefault(rest, []):
            insort(free, rest)
        with_free[rest].append(place)
    return [_join([rows[number] for number in sorted(numbers)]) for numbers in sorted(bins, key=min)]


def _join(rows: Sequence[Row]) -> dict[str, Any]:
    """Joins rows into one. The first token of each is not learned, because its prediction would come from the
    row before.
    """
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in (IGNORED, *row["labels"][1:])],
        "position_ids": [position for row in rows for position in range(len(row["input_ids"]))],
    }


def require_apart(model: Any, rows: Sequence[Row]) -> None:
    """Raises unless the model, with its adapters, gives two packed rows the logits that each has alone.

    Raises:
        Unsupported: the logits differ, or the model takes no position ids.
    """
    accepted = signature(model.forward).parameters
    remedy = "leave packing out; group_by_length saves padding, too"
    if "position_ids" not in accepted:
        raise Unsupported(
            "the model takes no position_ids, which keep packed rows apart",
            found=type(model).__name__,
            remedy=remedy,
        )
    longest = sorted(rows, key=lambda row: -len(row["input_ids"]))[:2]
    pair = [
        {"input_ids": list(row["input_ids"][:_TRIED]), "labels": list(row["input_ids"][:_TRIED])}
        for row in longest
    ]
    options = {"use_cache": False} if "use_cache" in accepted else {}
    device = device_of(model)

    def logits(row: Row) -> torch.Tensor:
        inputs = {
            key: torch.tensor([row[key]], device=device)
            for key in ("input_ids", "position_ids")
            if key in row
        }
        return model(**inputs, **options).logits[0].float()

    with torch.no_grad(), evaluation_mode(model):
        alone = torch.cat([logits({"input_ids": row["input_ids"]}) for row in pair])
        together = logits(_join(pair))
    # A model that ignores restarting positions lets the second row attend to the first, which changes its
    # logits far more than rounding does.
    off = float((alone - together).abs().max())
    most = float(alone.abs().max())
    if off > max(_ROUNDED, coarse(model)) * most:
        raise Unsupported(
            "this model, or the adapter in it, does not keep packed rows apart",
            found=f"logits that are up to {off:.3g} off, of at most {most:.3g}",
            where=type(model).__name__,
            remedy=remedy,
        )


_ROUNDED = 1e-4
"""How much logits may differ because sums run in another order, relative to the largest."""
