"""Checks the arguments that all kinds of merges share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError
from ...pack.pack import Pack


def weights_of(weights: Sequence[float] | None, packs: Sequence[Pack]) -> list[float]:
    """Returns one finite weight for each pack; 1 each by default.

    Raises:
        ConfigError: the number of weights is not that of the packs, or a weight is not finite.
    """
    factors = [1.0] * len(packs) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(packs):
        raise ConfigError(
            "every pack needs a weight",
            where="weights",
            expected=len(packs),
            found=len(factors),
            remedy="give as many weights as packs",
        )
    for factor in factors:
        if not math.isfinite(factor):
            raise ConfigError(
                "a weight must be a finite number",
                where="weights",
                found=factor,
                remedy="give a number such as 0.5",
            )
    return factors


def require_outside(out: Path, inputs: Sequence[Path]) -> None:
    """Raises ConfigError if the output would be inside a folder that is read."""
    for folder in inputs:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                "the output would lie inside an input, and inputs are never changed",
                where=out,
                found=folder,
                remedy="choose a folder outside it",
            )
