"""A change expressed in bases that many packs share: the form in which a fleet stores its members and a
runtime keeps them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .quantized_tensors import scale_codes


class SharedFactors(NamedTuple):
    """``D = up (scales codes) down``: ``down`` ``[k, in]`` and ``up`` ``[out, k]`` are the same arrays for
    all packs with the same ``bases``; the core is the pack's own, int8 ``[k, k]`` with scales ``[k, 1]``.
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
