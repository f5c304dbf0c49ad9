"""FourierFT: a change that is sparse in the frequency domain (Gao et al. 2024, arXiv 2405.03003, section 3).

    W' = W + s * Re(ifft2(S)),   S [out, in] zero but for n trained coefficients at seeded places

The coefficients start at zero, so that a fresh adapter changes nothing; PEFT's default starts them at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated

import numpy as np
from msgspec import Meta

from . import (
    LARGEST_WHOLE,
    METHODS,
    NO_EXTRAS,
    TRANSPOSED,
    Arrays,
    Dense,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    PeftKeys,
    Seed,
    Site,
    SiteConfig,
    Storage,
    Traits,
    array_namespace,
    pattern_of,
    require_widths,
    scatter,
)
from .core.torch_random import places

Coefficients = Annotated[int, Meta(ge=1, le=LARGEST_WHOLE)]
"""The type of a number of coefficients."""


@dataclass(frozen=True)
class FourierFT(SiteConfig):
    """The hyper-parameters of FourierFT; a layer with fewer weights than ``n_frequency`` has a coefficient
    for each.

    Example:
        >>> FourierFT(n_frequency=1000, n_frequency_pattern={"v_proj": 500}).at("layers.0.v_proj").n_frequency
        500
    """

    n_frequency: Coefficients = 1000
    scaling: FiniteFloat = 150.0
    random_loc_seed: Seed = 777
    n_frequency_pattern: Mapping[str, int] = pattern_of("n_frequency")

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies the inverse transform."""
        return self.scaling


def count_coefficients(cfg: FourierFT, site: Site) -> int:
    """Returns how many coefficients a layer has: at most as many as weights."""
    return min(cfg.n_frequency, site.in_features * site.out_features)


@lru_cache(maxsize=64)
def _half_spectrum(seed: int, rows: int, columns: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the left half of the spectrum whose transform is real: its positions, int64 ``[2, n]``, and the
    indices of the two coefficients that add up at each, ``[2, n]``.

    ``Re(ifft2(S))`` is the transform of ``(S(p, q) + S(-p, -q)) / 2``, whose right half follows from the
    left. If only one coefficient contributes to a position, the other index is ``count``, which is padded
    with zero.
    """
    drawn = places(seed, rows, columns, count)
    flat, mirrored = (
        np.ravel_multi_index(tuple(at % [[rows], [columns]]), (rows, columns)) for at in (drawn, -drawn)
    )
    # A coefficient and its mirror image contribute to the same real transform, so the spectrum needs the
    # union of both.
    cells = np.union1d(flat, mirrored)
    cells = cells[cells % columns <= columns // 2]
    numbers = np.full((2, len(cells)), count)
    for row, entries in zip(numbers, (flat, mirrored), strict=True):
        at = np.searchsorted(cells, entries).clip(max=len(cells) - 1)
        inside = cells[at] == entries
        row[at[inside]] = np.arange(count)[inside]
    return np.stack(np.divmod(cells, columns)), numbers


def _constants(cfg: FourierFT, site: Site) -> Arrays:
    require_widths(site)
    cells, numbers = _half_spectrum(
        cfg.random_loc_seed, site.out_features, site.in_features, count_coefficients(cfg, site)
    )
    return {"fourierft_places": cells, "fourierft_numbers": numbers}


def _normal_form(cfg: FourierFT, params: Params, site: Site) -> NormalForm:
    values = params["fourierft_spectrum"]
    numbers = params["fourierft_numbers"]
    rows, columns = site.out_features, site.in_features
    xp = array_namespace(values)
    # FFTs are not implemented for half precision
    exact, pairs = (xp.float64, xp.complex128) if values.dtype == xp.float64 else (xp.float32, xp.complex64)
    padded = xp.concat(
        [
            xp.astype(values, exact, copy=False) * (cfg.scale / 2),
            xp.zeros(1, dtype=exact, device=values.device),
        ]
    )
    met = xp.sum(xp.reshape(xp.take(padded, xp.reshape(numbers, (-1,)), axis=0), numbers.shape), axis=0)
    half = scatter(xp, xp.astype(met, pairs), params["fourierft_places"], (rows, columns // 2 + 1))
    change = xp.fft.irfft(xp.fft.ifft(half, axis=0), n=columns, axis=1)
    return NormalForm(down=Dense(xp.astype(change, values.dtype, copy=False)))


_KEYS = PeftKeys(FourierFT, ("n_frequency", "scaling", "random_loc_seed"), NO_EXTRAS, anchored=False)

fourierft = METHODS.register(
    Method(
        name="fourierft",
        summary=(
            "a few trained coefficients of the change's two-dimensional spectrum, at places that a seed draws"
        ),
        paper="https://arxiv.org/abs/2405.03003",
        formula="W' = W + s Re(ifft2(S)),  S sparse",
        config=FourierFT,
        traits=Traits(additive=True),
        shapes=lambda cfg, site: {"fourierft_spectrum": (count_coefficients(cfg, site),)},
        init=lambda cfg, site, rng: {
            "fourierft_spectrum": np.zeros(count_coefficients(cfg, site), np.float32)
        },
        normal_form=_normal_form,
        examples=(FourierFT(n_frequency=3), FourierFT(n_frequency=40, scaling=30, random_loc_seed=5)),
        # a small layer has as many coefficients as weights, because PEFT refuses more
        storage=Storage(
            constants=_constants,
            resolve=lambda configs, sites: [
                replace(cfg, n_frequency=count_coefficients(cfg, site))
                if site.in_features and site.out_features
                else cfg
                for cfg, site in zip(configs, sites, strict=True)
            ],
        ),
        peft=_KEYS.form(peft_type="FOURIERFT", suffixes=("fourierft_spectrum",), layers=TRANSPOSED),
    )
)
