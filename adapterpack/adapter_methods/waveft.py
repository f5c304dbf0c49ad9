"""WaveFT: a change that is sparse in the wavelet domain (Bilican et al. 2025, arXiv 2505.12532, section 3).

    W' = W + s * IDWT2(S),   or  W' = W + s S  without ``use_idwt``
    S is zero except for n trained coefficients at seeded places

The coefficients form four quarters: coarse rows and columns top left, fine rows top right, fine columns
bottom left, both fine bottom right. They start at zero, so that a fresh adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from . import (
    METHODS,
    NO_EXTRAS,
    TRANSPOSED,
    Arrays,
    Dense,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    PeftContent,
    PeftKeys,
    Site,
    Storage,
    Traits,
    array_namespace,
    require_widths,
    scatter,
)
from .core.torch_random import places
from .core.wavelets import filters, inverse
from .fourierft import Coefficients, FourierFT, count_coefficients


@dataclass(frozen=True)
class WaveFT(FourierFT):
    """The hyper-parameters of WaveFT; a layer with fewer weights than ``n_frequency`` has a coefficient for
    each.

    With ``proportional_parameters`` the coefficients of all layers together are dealt out by the layers'
    sizes.

    Example:
        >>> WaveFT(n_frequency=1000, n_frequency_pattern={"v_proj": 500}).at("layers.0.v_proj").n_frequency
        500
    """

    n_frequency: Coefficients = 2592
    scaling: FiniteFloat = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    proportional_parameters: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        filters(self.wavelet_family)


def _resolve(configs: Sequence[Any], sites: Sequence[Site]) -> list[Any]:
    """Sets the number of coefficients at each site: its share of the total, limited to the number of weights
    of the layer.
    """
    sizes = [site.in_features * site.out_features for site in sites]
    if not all(sizes):
        return list(configs)
    dealt = [
        replace(
            cfg,
            n_frequency=max(1, round(size / sum(sizes) * (cfg.n_frequency * len(sites)))),
            proportional_parameters=False,
        )
        if cfg.proportional_parameters
        else cfg
        for cfg, size in zip(configs, sizes, strict=True)
    ]
    return [
        replace(cfg, n_frequency=count_coefficients(cfg, site))
        for cfg, site in zip(dealt, sites, strict=True)
    ]


@lru_cache(maxsize=64)
def _quarters(seed: int, rows: int, columns: int, count: int, taps: int) -> np.ndarray:
    """Returns the positions of the coefficients in quarters large enough for the transform to give ``[rows,
    columns]``.

    A draw is a position in ``[rows, columns]``, centred within a margin. PEFT's top right quarter holds the
    fine rows and its bottom left quarter the fine columns; they are swapped here, so that rows and columns
    can be transformed one after the other.
    """
    sizes = np.array([[-(-(width + taps - 2) // 2) * 2] for width in (rows, columns)])
    at = places(seed, rows, columns, count) + (sizes - [[rows], [columns]]) // 2
    half = sizes // 2
    fine = at // half
    rest = at % half
    turned: np.ndarray = rest + half * fine[::-1]
    return turned


def _constants(cfg: WaveFT, site: Site) -> Arrays:
    require_widths(site)
    drawn = (cfg.random_loc_seed, site.out_features, site.in_features, count_coefficients(cfg, site))
    return {
        "waveft_places": _quarters(*drawn, len(filters(cfg.wavelet_family)[0]))
        if cfg.use_idwt
        else places(*drawn)
    }


def _normal_form(cfg: WaveFT, params: Params, site: Site) -> NormalForm:
    values = cfg.scale * params["waveft_spectrum"]
    at = params["waveft_places"]
    shape = (site.out_features, site.in_features)
    xp = array_namespace(values)
    if not cfg.use_idwt:
        return NormalForm(down=Dense(scatter(xp, values, at, shape)))
    low, high = filters(cfg.wavelet_family)
    sizes = [-(-(width + len(low) - 2) // 2) * 2 for width in shape]
    # The 2D transform is separable: first along rows, then along columns through a transpose.
    rows = inverse(xp, scatter(xp, values, at, (sizes[0], sizes[1])), low, high)
    return NormalForm(down=Dense(inverse(xp, rows.T, low, high).T[: shape[0], : shape[1]]))


_KEYS = PeftKeys(
    WaveFT,
    ("n_frequency", "scaling", "wavelet_family", "use_idwt", "random_loc_seed", "proportional_parameters"),
    {**NO_EXTRAS, "proportional_parameters": False},
)


def _from_peft_file(content: PeftContent) -> PeftContent:
    """Reads the number of coefficients from the tensors, if PEFT distributed them by size."""
    if not content.config.proportional_parameters:
        return content
    counts = {
        f"^{path}": len(params["waveft_spectrum"])
        for path, params in content.sites.items()
        if "waveft_spectrum" in params
    }
    return content.configure(n_frequency_pattern=counts, proportional_parameters=False)


waveft = METHODS.register(
    Method(
        name="waveft",
        summary="a few trained coefficients of the change's wavelet transform, at places that a seed draws",
        paper="https://arxiv.org/abs/2505.12532",
        formula="W' = W + s IDWT2(S),  S sparse",
        config=WaveFT,
        traits=Traits(additive=True),
        shapes=lambda cfg, site: {"waveft_spectrum": (count_coefficients(cfg, site),)},
        init=lambda cfg, site, rng: {"waveft_spectrum": np.zeros(count_coefficients(cfg, site), np.float32)},
        normal_form=_normal_form,
        examples=(
            WaveFT(n_frequency=4),
            WaveFT(n_frequency=30, scaling=3, wavelet_family="db3"),
            WaveFT(n_frequency=5, use_idwt=False),
            WaveFT(n_frequency=7, proportional_parameters=True),
        ),
        storage=Storage(constants=_constants, resolve=_resolve),
        peft=_KEYS.form(
            peft_type="WAVEFT",
            suffixes=("waveft_spectrum",),
            layers=TRANSPOSED,
            from_peft_file=_from_peft_file,
        ),
    )
)
