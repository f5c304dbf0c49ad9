"""What rules made of many sites as factors of the rank that was asked for, with what that leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .cut import Cut
from .finder import Held, Rows, largest
from .rule import Combined
from .space import Factors
from .spectra import Loss, recompressed
from .threads import in_order

_HOLD = 1 << 26
"""Numbers of a dense change that are held while it is cut: 256 MB in float32, four times a site of 4096 x 4096."""


def finished(combined: Sequence[Combined], cut: Cut, reduce: bool) -> list[tuple[Factors, Loss | None]]:
    """Every change as factors, and its loss; None where it was left as it stands: neither cut nor brought to its rank (``reduce``)."""
    found: list[tuple[Factors, Loss | None]] = list(in_order(
        lambda change: (change, None) if isinstance(change, Factors) else largest(_held(change), cut).cut(cut), combined))
    narrow = [index for index, change in enumerate(combined) if isinstance(change, Factors)]
    if narrow and (cut.asked or reduce):
        for index, made in zip(narrow, recompressed([found[index][0] for index in narrow], cut), strict=True):
            found[index] = made
    return found


def finite(change: Factors) -> bool:
    """Whether all numbers are finite."""
    return bool(np.isfinite(change.A).all() and np.isfinite(change.B).all())


def _held(change: Rows) -> Rows:
    """A dense change in memory, if it is of a bearable size: else every pass of the range finder would make it anew."""
    m, n = change.shape
    return Held(np.concatenate([block for _, block in change.blocks()], axis=0)) if 0 < m * n <= _HOLD else change
