"""The LoRAs of a batch's rows in one operator of ONNX Runtime, ``AddLora``, which reads each adapter's
factors where they lie.

It is there where it was built (see :mod:`.build`) and the processor has fused multiply-add. Sums are added up
in one order whatever rows go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .loading import load

_kernel = load("_row_lora")
LIBRARY: str | None = None if _kernel is None else _kernel.__file__
"""The file that ONNX Runtime loads the operator from, None where it is not there."""
DOMAIN, OPERATOR = "adapterpack", "AddLora"
_LEAST, _MOST = 2.0**-14, 2.0**15
"""Between these a part's largest number is in float16 as exact as all others."""


class LoraPart(NamedTuple):
    """The factors of a linear layer, or of one of the siblings that share it: ``down`` ``[in, rank]``, ``up``
    ``[rank, out]``, and the column of the product at which ``up`` begins.
    """

    down: np.ndarray
    up: np.ndarray
    at: int


class HeldAdapter:
    """Holds a copy of an adapter's factors, by layer, under a ``number`` by which ``AddLora`` finds them.

    With ``half`` they are held in float16 if none is too large or too small for it, else in float32.

    Example:
        >>> ones = LoraPart(np.ones((4, 2), np.float32), np.ones((2, 3), np.float32), 0)
        >>> HeldAdapter([[ones]], half=True).nbytes if LIBRARY else 28
        28
    """

    def __init__(self, sites: Sequence[Sequence[LoraPart]], half: bool) -> None:
        factors = [factor for parts in sites for part in parts for factor in part[:2] if factor.size]
        half = half and all(_fits(factor) for factor in factors)
        held = np.empty(sum(factor.size for factor in factors), np.float16 if half else np.float32)
        self.nbytes, self._at, self._held = held.nbytes, 0, held
        packed = [[(self._copy(down.T), self._copy(up), at) for down, up, at in parts] for parts in sites]
        assert _kernel is not None
        self.number, self._holder = _kernel.hold(packed, half)

    def _copy(self, factor: np.ndarray) -> np.ndarray:
        """Copies a factor behind the one before, so that memory is read from front to back."""
        there = self._held[self._at : self._at + factor.size].reshape(factor.shape)
        there[...] = factor
        self._at += factor.size
        return there


class AdapterNumbers:
    """The numbers of some rows' adapters, -1 for a row without one, as an array that keeps the adapters."""

    def __init__(self, rows: Sequence[HeldAdapter | None]) -> None:
        self._rows = rows
        self._numbers = np.array([-1 if one is None else one.number for one in rows], np.int64)
        self.__array_interface__ = self._numbers.__array_interface__


def _fits(factor: np.ndarray) -> bool:
    largest = max(float(factor.max()), -float(factor.min()))
    return not largest or _LEAST <= largest <= _MOST
