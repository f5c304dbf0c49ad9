"""The Init value: how the two factors of a low-rank branch begin, and what that needs to know of a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...registry import Registry
from ..core.site import Site

Factors = tuple[np.ndarray, np.ndarray]


class Init(NamedTuple):
    """``make(r, scale, site, options, rng)`` gives float32 A ``[r, in]`` and B ``[out, r]``; ``scale``
    multiplies ``B A`` in the layer.

    ``needs`` names what must be known: ``weight``, ``moment``, ``gradient``. ``cancels``: ``B A`` is not
    zero, so the start is taken off again. ``frozen`` names the factor that stays as it begins. ``ranks`` may
    share the ranks out among the sites anew. ``options`` are the settings that it knows, with their defaults.
    """

    name: str
    summary: str
    paper: str
    make: Callable[[int, float, Site, Mapping[str, Any], np.random.Generator], Factors]
    needs: frozenset[str] = frozenset()
    cancels: bool = False
    frozen: frozenset[str] = frozenset()
    options: Mapping[str, Any] = {}
    ranks: Callable[[Mapping[str, int], Sequence[Site], Mapping[str, Any]], Mapping[str, int]] | None = None


INITS: Registry[Init] = Registry(
    "initialisation", Init, "adapterpack.inits", "adapterpack.adapter_methods.inits"
)
"""Name -> init: what a config's ``init`` may be."""


def split(u: np.ndarray, values: np.ndarray, vt: np.ndarray, scale: float) -> Factors:
    """``A, B`` with ``scale * B A = u diag(values) vt``, the singular values split evenly."""
    half = np.sqrt(values / abs(scale))
    sign = 1.0 if scale > 0 else -1.0
    return (half[:, None] * vt).astype(np.float32), (sign * half * u).astype(np.float32)


def pad(factors: Factors, r: int) -> Factors:
    """Factors of a smaller rank with rows and columns of zeros up to ``r``: a layer may be narrower than the
    rank.
    """
    A, B = factors
    lacking = r - len(A)
    return (np.pad(A, ((0, lacking), (0, 0))), np.pad(B, ((0, 0), (0, lacking)))) if lacking else factors
