"""FourierFT: a change that is sparse in the frequency domain (Gao et al. 2024, arXiv 2405.03003, section 3).

    W' = W + s * Re(ifft2(S)),   S [out, in] zero but for n trained coefficients at seeded places

The coefficients start at zero, so that a fresh adapter changes nothing; PEFT's default starts them at random, so that it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from .base import AttachForm, Method, Params, PeftForm, Site, Traits, require_widths
from .config import SiteConfig, by_suffix, require_number, require_whole
from .operators import Array, Dense
from .peft_pattern import default_and_pattern, literal
from .positions import places, scattered


@dataclass(frozen=True)
class FourierFT(SiteConfig):
    """The hyper-parameters of FourierFT; a layer with fewer weights than ``n_frequency`` has a coefficient for each.

    Example:
        >>> FourierFT(n_frequency=1000, n_frequency_pattern={"v_proj": 500}).at("layers.0.v_proj").n_frequency
        500
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("n_frequency", self.n_frequency)
        require_whole("random_loc_seed", self.random_loc_seed, 0)
        require_number("scaling", self.scaling)
        object.__setattr__(self, "scaling", float(self.scaling))

    def at(self, path: str) -> FourierFT:
        """The config at one site: ``n_frequency`` looked up by the literal path or its last components."""
        return replace(self, n_frequency=by_suffix(self.n_frequency_pattern, path, self.n_frequency), n_frequency_pattern={})

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies the inverse transform."""
        return self.scaling


def _count(cfg: FourierFT, site: Site) -> int:
    return min(cfg.n_frequency, site.in_features * site.out_features)


def _settle(configs: Sequence[Any], sites: Sequence[Site]) -> list[Any]:
    """PEFT refuses more coefficients than weights: a small layer's config says its own number."""
    known = [site.in_features and site.out_features for site in sites]
    return [replace(cfg, n_frequency=_count(cfg, site)) if yes else cfg for cfg, site, yes in zip(configs, sites, known, strict=True)]


def _constants(cfg: FourierFT, site: Site) -> dict[str, np.ndarray]:
    require_widths(site)
    return {"fourierft_places": places(cfg.random_loc_seed, site.out_features, site.in_features, _count(cfg, site))}


def _attach(cfg: FourierFT, params: Params, site: Site) -> AttachForm:
    values = params["fourierft_spectrum"]
    xp = array_namespace(values)
    wide = values if values.dtype == xp.float64 else xp.astype(values, xp.float32)  # no transform of half precision
    weight = wide * (cfg.scale / (site.in_features * site.out_features))
    change = _real_transform(xp, scattered(xp, weight, params["fourierft_places"], (site.out_features, site.in_features)))
    return AttachForm(down=Dense(xp.astype(change, values.dtype)))


def _real_transform(xp: Any, spectrum: Array) -> Array:
    """``Re(fft2(S))``, which is ``m n Re(ifft2(S))`` as S is real: half of it is computed, the other half is its mirror image."""
    half = xp.real(xp.fft.rfftn(spectrum))
    upside = xp.concat([half[:1], xp.flip(half[1:], axis=0)], axis=0)
    return xp.concat([half, xp.flip(upside[:, 1 : (spectrum.shape[1] + 1) // 2], axis=1)], axis=1)


def _to_peft(sites: Mapping[str, Any]) -> dict[str, Any]:
    first: FourierFT = next(iter(sites.values()))
    default, pattern = default_and_pattern({path: cfg.n_frequency for path, cfg in sites.items()}, anchored=False)
    return {
        "n_frequency": default,
        "n_frequency_pattern": pattern,
        "scaling": first.scaling,
        "random_loc_seed": first.random_loc_seed,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
    }


def _from_peft(config: Mapping[str, Any]) -> FourierFT:
    return FourierFT(
        n_frequency=config.get("n_frequency", 1000),
        scaling=config.get("scaling", 150.0),
        random_loc_seed=config.get("random_loc_seed", 777),
        n_frequency_pattern=literal(config.get("n_frequency_pattern"), "n_frequency_pattern"),
    )


fourierft = Method(
    name="fourierft",
    summary="a few trained coefficients of the change's two-dimensional spectrum, at places that a seed draws",
    paper="https://arxiv.org/abs/2405.03003",
    config=FourierFT,
    traits=Traits(additive=True, identity_at_init=True, row_separable=True, low_rank=False),
    shapes=lambda cfg, site: {"fourierft_spectrum": (_count(cfg, site),)},
    init=lambda cfg, site, rng: {"fourierft_spectrum": np.zeros(_count(cfg, site), np.float32)},
    attach=_attach,
    examples=(FourierFT(n_frequency=3), FourierFT(n_frequency=40, scaling=30, random_loc_seed=5)),
    peft=PeftForm(
        peft_type="FOURIERFT",
        suffixes={"fourierft_spectrum": "fourierft_spectrum"},
        to_config=_to_peft,
        from_config=_from_peft,
        features=lambda params: (None, None),
    ),
    constants=_constants,
    settle=_settle,
)
