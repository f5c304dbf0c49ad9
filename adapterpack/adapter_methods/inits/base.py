"""Defines :class:`Init`: how the two factors of a low-rank branch start, and which data about a site that
requires.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...registry import Registry
from .. import Random, Site

Factors = tuple[np.ndarray, np.ndarray]
Options = Mapping[str, Any]
"""The options of an initialisation by name, which have the types of their defaults."""


class Init(NamedTuple):
    """An initialisation. ``make(r, scale, site, options, rng)`` returns float32 A ``[r, in]`` and B ``[out,
    r]``; the layer multiplies ``B A`` by ``scale``.

    ``needs`` names the data that ``make`` reads: ``weight``, ``moment``, ``gradient``. ``cancels``: ``B A``
    is not zero at the start, so the branch subtracts its start. ``frozen`` names the factor that is not
    trained. ``ranks`` may redistribute the ranks among the sites. ``options`` are the settings of the init
    with their defaults.
    """

    name: str
    summary: str
    paper: str
    make: Callable[[int, float, Site, Options, Random], Factors]
    needs: frozenset[str] = frozenset()
    cancels: bool = False
    frozen: frozenset[str] = frozenset()
    options: Mapping[str, Any] = {}
    ranks: Callable[[Mapping[str, int], Sequence[Site], Options], Mapping[str, int]] | None = None


INITS: Registry[Init] = Registry(
    "initialisation", Init, "adapterpack.inits", "adapterpack.adapter_methods.inits"
)
"""Name -> init: the values that a config's ``init`` may have."""


def split(u: np.ndarray, values: np.ndarray, vt: np.ndarray, scale: float) -> Factors:
    """Returns ``A, B`` with ``scale * B A = u diag(values) vt``, the singular values divided evenly between
    them.
    """
    half = np.sqrt(values / abs(scale))
    sign = 1.0 if scale > 0 else -1.0
    return (half[:, None] * vt).astype(np.float32), (sign * half * u).astype(np.float32)


def pad(factors: Factors, r: int) -> Factors:
    """Pads the factors with zeros to rank ``r``, because a layer may be narrower than the rank."""
    A, B = factors
    lacking = r - len(A)
    return (np.pad(A, ((0, lacking), (0, 0))), np.pad(B, ((0, 0), (0, lacking)))) if lacking else factors
