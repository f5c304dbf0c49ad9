"""Defines a scheme for packs: it chooses the code in which each direction of a matrix is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..manifest import Run
from ..registry import Registry


class PackScheme(NamedTuple):
    """``runs`` returns the codes of a matrix from the norms ``[d]`` of its directions; ``group`` numbers of a
    direction share a scale, None for all of them. ``decomposed``: the change is first rewritten by its
    singular vectors, in falling order of the singular values.
    """

    name: str
    summary: str
    runs: Callable[[np.ndarray], Sequence[Run]]
    group: int | None = None
    decomposed: bool = False


PACK_SCHEMES = Registry(
    "scheme for packs", PackScheme, "adapterpack.pack_schemes", "adapterpack.quantizing.pack_schemes"
)
"""Name -> scheme. A module of this folder registers the one that it defines."""


def all_in(code: str) -> Callable[[np.ndarray], Sequence[Run]]:
    """Returns a function that stores every direction in one code.

    Example:
        >>> all_in("int8")(np.ones(5))
        [Run(count=5, code='int8')]
    """
    return lambda norms: [Run(len(norms), code)]
