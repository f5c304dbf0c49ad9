"""Turns the results of a rule into factors of the requested rank, and measures the truncation error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from ..io import all_finite, in_order
from ..lowrank import (
    Cut,
    Factors,
    FactorSum,
    InMemory,
    LeadingSpectrum,
    Loss,
    RowSource,
    energy_of,
    largest,
    recompress_all,
    zero,
)
from ..lowrank.spectra import spectra
from .rules.rule import Combination

T = TypeVar("T")

MAX_IN_MEMORY = 1 << 26
"""The largest dense change, in numbers, to hold in memory during truncation: 256 MB in float32, four times a
site of 4096 x 4096.
"""


def cut_all(combined: Sequence[Combination], cut: Cut, reduce: bool) -> list[tuple[Factors, Loss | None]]:
    """Returns every change as factors with its loss; the loss is None for a change that was neither truncated
    nor reduced to its rank (``reduce``).
    """
    # changes that are factors are recompressed together; dense ones go through the range finder one by one
    narrow = {
        index: change for index, change in enumerate(combined) if isinstance(change, Factors | FactorSum)
    }
    results: dict[int, tuple[Factors, Loss | None]] = dict(
        _of_dense(combined, lambda index, change: largest(change, cut).cut(cut))
    )
    if cut.settings or reduce:
        results |= zip(narrow, recompress_all(list(narrow.values()), cut), strict=True)
    else:
        results |= {index: (change.joined(), None) for index, change in narrow.items()}
    return [results[index] for index in range(len(combined))]


def decompose_all(combined: Sequence[Combination], most: Sequence[int]) -> list[LeadingSpectrum]:
    """Returns the singular values and vectors of every change, for sharing out a budget; of a dense change
    the ``most`` largest.
    """
    results = [
        LeadingSpectrum(spectrum, energy_of(spectrum.S), True)
        for spectrum in spectra(
            [change if isinstance(change, Factors | FactorSum) else zero(1, 1) for change in combined]
        )
    ]
    for index, decomposition in _of_dense(combined, lambda index, change: largest(change, Cut(most[index]))):
        results[index] = decomposition
    return results


def finite(change: Factors) -> bool:
    """Whether all numbers are finite."""
    return all_finite(change.A) and all_finite(change.B)


def _of_dense(combined: Sequence[Combination], work: Callable[[int, RowSource], T]) -> list[tuple[int, T]]:
    """Runs ``work`` on each dense change and returns (index, result) pairs; each thread holds one change in
    memory at a time.
    """
    dense = [
        (index, change)
        for index, change in enumerate(combined)
        if not isinstance(change, Factors | FactorSum)
    ]
    return list(in_order(lambda item: (item[0], work(item[0], _in_memory(item[1]))), dense))


def _in_memory(change: RowSource) -> RowSource:
    """Computes a dense change and holds it in memory unless it is too large: otherwise every pass of the
    range finder would recompute it.
    """
    m, n = change.shape
    if not 0 < m * n <= MAX_IN_MEMORY:
        return change
    whole: np.ndarray | None = None
    for rows, block in change.blocks():
        if whole is None:
            whole = np.empty((m, n), block.dtype)
        whole[rows] = block
    assert whole is not None
    return InMemory(whole, change.guess)
