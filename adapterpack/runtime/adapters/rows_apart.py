"""Joins the results of rows of one batch that ran in several passes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...slots.precision import ABSENT, convert
from ..ort.values import HOST, Memory, empty, fill


def join_rows(pieces: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
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
