"""Compares what a bundle's slots are filled with, in its bank or its adapter files, with the packs that its manifest names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...errors import FormatError
from ...slots.values import Values

_NEAR = 5e-3
"""How far numbers may lie apart, as a share of the largest: other machines round products otherwise; other adapters are farther away."""


def require_contents(expected: Values, found: Mapping[str, np.ndarray], where: Path, name: str | None) -> None:
    """Checks that slots are filled with an adapter's values; ``name`` is the adapter, or None for the base.

    Raises:
        FormatError: a slot holds something else.
    """
    for slot, value in expected.items():
        there = found.get(slot)
        if there is None or there.shape != value.shape or not _near(there, value):
            raise FormatError("the graph's slots do not hold the adapter that the manifest names" if name else
                              "the graph's slots change the base, where no adapter is named", where=f"{where}, {slot}",
                              expected=f"the values of {name!r}" if name else "values that change nothing",
                              found="other values" if there is not None and there.shape == value.shape else "none of this shape",
                              remedy="do not use this bundle; export it again")


def _near(one: np.ndarray, two: np.ndarray) -> bool:
    if np.array_equal(one, two):
        return True
    one, two = one.astype(np.float32), two.astype(np.float32)
    size = float(np.abs(two).max(initial=0.0))
    return bool(np.abs(one - two).max(initial=0.0) <= _NEAR * size)  # NaN is near nothing
