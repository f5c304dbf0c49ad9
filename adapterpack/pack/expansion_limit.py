"""Limits how much a pack can make its reader compute, to a multiple of what it stores and of the layers that
it changes.

A seed can stand for a matrix of any size, and small factors for a large product, so without a limit a few
kilobytes could ask for gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..adapter_methods import Method, Site, amount
from ..errors import FormatError
from ..manifest import TensorEntry

FACTOR = 16
"""How many numbers may be computed for each stored number and for each changed weight; methods need three or
four.
"""
FREE = 1 << 24
"""How many numbers may be computed in any case: 64 MiB in float32."""


def require_limit(
    sites: Iterable[tuple[Method, Any, Site]], tensors: Mapping[str, TensorEntry], where: object
) -> None:
    """Checks that the methods compute no more at these sites than the stored ``tensors`` and the weights
    there allow.

    Raises:
        FormatError: the methods would compute more.
    """
    made = weights = 0
    stored = sum(math.prod(entry.shape) for entry in tensors.values())
    for method, cfg, site in sites:
        sized = (
            site
            if site.in_features and site.out_features
            else replace(site, in_features=site.in_features or 1, out_features=site.out_features or 1)
        )
        made += site.stack * amount(method, cfg, sized)
        weights += site.stack * sized.in_features * sized.out_features
    most = FACTOR * (stored + weights) + FREE
    if made > most:
        raise FormatError(
            "the adapter would make far more numbers than it stores or changes",
            where=where,
            expected=f"at most {most}",
            found=made,
            remedy="pack the adapter again, with a smaller rank",
        )
