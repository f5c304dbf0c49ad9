"""What a scheme for packs is: a value that says in which code each direction of a matrix is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..manifest.structs import Run
from ..registry import Registry


class PackScheme(NamedTuple):
    """``runs`` gives the codes of a matrix whose directions have these norms ``[d]``; ``group`` numbers of a
    direction share a scale, None is all of them. ``decomposed``: a change is written by its singular vectors
    first, the largest singular value first.
    """

    name: str
    summary: str
    runs: Callable[[np.ndarray], Sequence[Run]]
    group: int | None = None
    decomposed: bool = False


PACK_SCHEMES: Registry[PackScheme] = Registry(
    "scheme for packs", PackScheme, "adapterpack.pack_schemes", "adapterpack.quantizing.pack_schemes"
)
"""Name -> scheme. A module of this folder registers the one that it defines."""


def all_in(code: str) -> Callable[[np.ndarray], Sequence[Run]]:
    """Every direction in one code.

    Example:
        >>> all_in("int8")(np.ones(5))
        [Run(count=5, code='int8')]
    """
    return lambda norms: [Run(len(norms), code)]
