"""What rules made of many sites as factors of the rank that was asked for, with what that leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from ..io.safetensors import all_finite
from ..io.threads import in_order
from ..lowrank.range_finder import Found, Held, Rows, largest
from ..lowrank.space import Factors, Sum, zero
from ..lowrank.spectra import Loss, recompressed, spectra
from ..lowrank.truncation import Cut, energy_of
from .rules.rule import Combined

T = TypeVar("T")

HOLD = 1 << 26
"""Numbers of a dense change that are held while it is cut: 256 MB in float32, four times a site of 4096 x 4096."""


def finished(combined: Sequence[Combined], cut: Cut, reduce: bool) -> list[tuple[Factors, Loss | None]]:
    """Every change as factors, and its loss; None where it was left as it stands: neither cut nor brought to its rank (``reduce``)."""
    narrow = {index: change for index, change in enumerate(combined) if isinstance(change, Factors | Sum)}
    made: dict[int, tuple[Factors, Loss | None]] = dict(_of_dense(combined, lambda index, change: largest(change, cut).cut(cut)))
    if cut.asked or reduce:
        made |= zip(narrow, recompressed(list(narrow.values()), cut), strict=True)
    else:
        made |= {index: (change.joined(), None) for index, change in narrow.items()}
    return [made[index] for index in range(len(combined))]


def decomposed(combined: Sequence[Combined], most: Sequence[int]) -> list[Found]:
    """The singular values and vectors of every change, for a budget to be shared out over; of a dense one the ``most`` largest."""
    found = [Found(each, energy_of(each.S), True)
             for each in spectra([change if isinstance(change, Factors | Sum) else zero(1, 1) for change in combined])]
    for index, made in _of_dense(combined, lambda index, change: largest(change, Cut(most[index]))):
        found[index] = made
    return found


def finite(change: Factors) -> bool:
    """Whether all numbers are finite."""
    return all_finite(change.A) and all_finite(change.B)


def _of_dense(combined: Sequence[Combined], work: Callable[[int, Rows], T]) -> list[tuple[int, T]]:
    """``work`` of the changes that are no factors, with their places; each thread holds one at a time."""
    dense = [(index, change) for index, change in enumerate(combined) if not isinstance(change, Factors | Sum)]
    return list(in_order(lambda item: (item[0], work(item[0], _held(item[1]))), dense))


def _held(change: Rows) -> Rows:
    """A dense change in memory, if it is of a bearable size: else every pass of the range finder would make it anew."""
    m, n = change.shape
    if not 0 < m * n <= HOLD:
        return change
    whole: np.ndarray | None = None
    for rows, block in change.blocks():
        if whole is None:
            whole = np.empty((m, n), block.dtype)
        whole[rows] = block
    assert whole is not None
    return Held(whole, change.guess)
