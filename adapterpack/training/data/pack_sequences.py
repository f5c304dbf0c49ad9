"""Packs rows of several lengths into longer ones that are all nearly full, in which each row still sees
nothing but itself.

A packed row says the position of each of its tokens in the row that it came from, and has no attention mask:
of positions that begin anew models of transformers make a mask of blocks. Whether a model does is tried
before anything is trained.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch

from ...errors import Unsupported
from ...tasks.task import IGNORED
from ...torch_adapters.canaries.canary import coarse
from ...torch_adapters.layers.weights import device_of

_TRIED = 12
"""Tokens of each of the two rows that a model is tried with."""


def pack_sequences(rows: Sequence[Mapping[str, Any]], width: int) -> list[dict[str, Any]]:
    """The rows, of ``input_ids`` and ``labels``, in as few of at most ``width`` tokens as best fit finds, the
    longest placed first.

    Example:
        >>> packed([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}], 4)
        [{'input_ids': [1, 2, 3], 'labels': [-100, 2, -100], 'position_ids': [0, 1, 0]}]
    """
    lengths = [len(row["input_ids"]) for row in rows]
    bins: list[list[int]] = []
    free: list[int] = []  # the different numbers of tokens that are left in bins, in order
    with_free: dict[int, list[int]] = {}
    for number in sorted(range(len(rows)), key=lambda number: -lengths[number]):
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


def _join(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of several: nothing is learned of the first token of each, which would follow the last one of
    another.
    """
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in (IGNORED, *row["labels"][1:])],
        "position_ids": [position for row in rows for position in range(len(row["input_ids"]))],
    }


def require_apart(model: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Checks that a model, with what is adapted in it, gives two packed rows the logits that each has alone.

    Raises:
        Unsupported: it does not.
    """
    accepted = signature(model.forward).parameters
    remedy = "leave packing out; group_by_length saves padding, too"
    if "position_ids" not in accepted:
        raise Unsupported(
            "the model takes no positions, by which packed rows are kept apart",
            found=type(model).__name__,
            remedy=remedy,
        )
    longest = sorted(rows, key=lambda row: -len(row["input_ids"]))[:2]
    pair = [
        {"input_ids": list(row["input_ids"][:_TRIED]), "labels": list(row["input_ids"][:_TRIED])}
        for row in longest
    ]
    options = {"use_cache": False} if "use_cache" in accepted else {}
    device, was_training = device_of(model, type(model).__name__), model.training

    def logits(row: Mapping[str, Any]) -> torch.Tensor:
        inputs = {
            key: torch.tensor([row[key]], device=device)
            for key in ("input_ids", "position_ids")
            if key in row
        }
        given: torch.Tensor = model(**inputs, **options).logits[0].float()
        return given

    model.eval()
    try:
        with torch.no_grad():
            alone = torch.cat([logits({"input_ids": row["input_ids"]}) for row in pair])
            together = logits(_join(pair))
    finally:
        model.train(was_training)
    off, most = float((alone - together).abs().max()), float(alone.abs().max())
    if off > max(_ROUNDED, coarse(model)) * most:
        raise Unsupported(
            "rows that are packed are not kept apart by this model, or by the adapter in it",
            found=f"logits that are up to {off:.3g} off, of at most {most:.3g}",
            where=type(model).__name__,
            remedy=remedy,
        )


_ROUNDED = 1e-4
"""The share of the largest logit that sums in another order may move."""
