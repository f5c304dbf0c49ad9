"""Puts what every row of a bundle carries, a correction of its quantized base, under the values of an adapter.

The correction is a part of the base: ``y = (base(x) + x C) * scale + ...``. Its factors are concatenated with those
of the adapter along the rank, in front of them, so that the graph adds both in the products that it has anyway.
"""

from __future__ import annotations

import numpy as np

from ..errors import Unsupported
from .values import Values

_BEFORE = ("pre", "turn", "turn_down", "turn_up")
"""What changes the input of a layer's own product: the correction would need the changed input, and its slot reads the other."""


def compensated(values: Values, compensation: Values) -> Values:
    """The values of an adapter, or of none, with the factors of a correction before its own.

    Raises:
        Unsupported: the adapter changes the input of a layer that is corrected.

    Example:
        >>> own, correction = ({"q.down": np.full((2, 1), n), "q.up": np.full((1, 2), n)} for n in (1.0, 3.0))
        >>> compensated(own, correction)["q.up"].tolist()
        [[3.0, 3.0], [1.0, 1.0]]
    """
    result = dict(values)
    for name, factor in compensation.items():
        path, _, field = name.rpartition(".")
        if changed := [before for before in _BEFORE if f"{path}.{before}" in values]:
            raise Unsupported("this adapter changes the input of a layer whose quantization is compensated", where=f"{path}.{changed[0]}",
                              remedy="quantize the bundle without --compensate")
        own = values.get(name)
        result[name] = factor if own is None else np.concatenate([factor.astype(own.dtype), own], axis=1 if field == "down" else 0)
    return result
