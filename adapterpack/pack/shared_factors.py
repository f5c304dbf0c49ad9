"""A change in bases that many packs share: what a pack of a fleet is made from, and what a runtime keeps of
it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .quantized_tensors import scale_codes


class SharedFactors(NamedTuple):
    """``D = up (scales codes) down``: ``down`` ``[k, in]`` and ``up`` ``[out, k]``, the same arrays for all
    packs of ``bases``, and a core of the pack's own in int8 ``[k, k]`` under scales ``[k, 1]``.
    """

    bases: str
    down: np.ndarray
    up: np.ndarray
    codes: np.ndarray
    scales: np.ndarray

    @property
    def core(self) -> np.ndarray:
        """The core ``[k, k]``, float32.

        Raises:
            NonFinite: a scale is so large that values overflow.
        """
        return scale_codes(self.codes, self.scales, self.bases)
