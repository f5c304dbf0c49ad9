"""Pads rows to a batch, and finds the positions of their tokens in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tasks import Arrays


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
