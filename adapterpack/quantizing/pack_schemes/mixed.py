"""Mixed: stores the leading singular directions of each change in int4, and the rest in int2, following
LoRAQuant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...manifest import Run
from ..pack_scheme import PACK_SCHEMES, PackScheme

SHARE = 0.9
"""The share of the squared singular values of a change that the int4 directions must reach."""


def leading(norms: np.ndarray) -> Sequence[Run]:
    """Returns int4 for the fewest leading directions that reach ``SHARE`` of the change, and int2 for the
    others.

    Both factors hold the square root of each singular value, so a direction of norm ``n`` has the singular
    value ``n^2``. Source: LoRAQuant, arXiv 2510.26690, section 3, which has other codes.

    Example:
        >>> leading(np.sqrt([3.0, 1.0, 0.5, 0.5]))
        [Run(count=2, code='int4'), Run(count=2, code='int2')]
    """
    energy = np.cumsum(norms**4)
    kept = min(len(norms), int(np.searchsorted(energy, SHARE * energy[-1])) + 1) if energy[-1] else len(norms)
    return [Run(count, code) for count, code in ((kept, "int4"), (len(norms) - kept, "int2")) if count]


PACK_SCHEMES.register(
    PackScheme(
        "mixed",
        f"leading singular directions ({SHARE:.0%} of a change) in int4, the others in int2",
        leading,
        64,
        decomposed=True,
    )
)
