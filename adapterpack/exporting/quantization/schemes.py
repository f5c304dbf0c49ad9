"""The schemes that the weights of a bundle's graphs can be quantized with."""

from __future__ import annotations

import math
from typing import NamedTuple

from ...errors import UnknownName, nearest


class Scheme(NamedTuple):
    """A weight-only scheme of MatMulNBits.

    ``accuracy`` is the op's accuracy_level: 4 (int8 activations) can flip tokens, so it is explicit. ``tolerance`` is the largest change
    of an output, as a share of the largest, with which a graph is still written. That of a wrong graph is larger;
    four bits may move the outputs of a model as far as that, so their change is recorded and not judged.
    """

    bits: int
    block_size: int
    symmetric: bool
    accuracy: int
    tolerance: float


SCHEMES = {"int4": Scheme(4, 32, False, 0, math.inf), "int8": Scheme(8, 32, False, 0, 0.1)}


def require_scheme(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in SCHEMES:
        raise UnknownName("unknown quantization scheme for a bundle", found=repr(name), remedy=nearest(name, SCHEMES))
    return SCHEMES[name]
