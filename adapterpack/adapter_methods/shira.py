"""SHiRA: a sparse change of high rank (Bhardwaj et al. 2024, arXiv 2406.13175, section 3; the random mask,
"SHiRA-Rand").

    W' = W + S,   S [out, in] zero but for r (in + out) trained values, as many as LoRA of rank r has

The positions are drawn from ``random_seed``, as PEFT draws them. Without a seed they are stored with the
values, in int32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import (
    METHODS,
    Arrays,
    Method,
    NormalForm,
    Params,
    PeftContent,
    PeftKeys,
    PositiveInt,
    Random,
    Seed,
    Shapes,
    Site,
    SiteConfig,
    Sparse,
    Storage,
    Traits,
    require_places,
    require_widths,
)
from .core.torch_random import places


@dataclass(frozen=True)
class SHiRA(SiteConfig):
    """The hyper-parameters of SHiRA; a layer with fewer weights than ``r (in + out)`` is trained whole.

    Example:
        >>> SHiRA(r=4).random_seed
        0
    """

    r: PositiveInt = 32
    random_seed: Seed | None = 0

    @property
    def redundant(self) -> bool:
        """Whether the positions are stored, because there is no seed."""
        return self.random_seed is None


def _count(cfg: SHiRA, site: Site) -> int:
    return min(cfg.r * (site.in_features + site.out_features), site.in_features * site.out_features)


@lru_cache(maxsize=64)
def _mask(seed: int, rows: int, columns: int, count: int) -> np.ndarray:
    """Returns the positions of a mask row by row: PEFT draws the mask as a matrix and reads the positions off
    it.
    """
    drawn = places(seed, rows, columns, count)
    return drawn[:, np.lexsort((drawn[1], drawn[0]))]


def _shapes(cfg: SHiRA, site: Site) -> Shapes:
    values = {"shira_weight": (_count(cfg, site),)}
    return {**values, "shira_indices": (2, _count(cfg, site))} if cfg.random_seed is None else dict(values)


def _init(cfg: SHiRA, site: Site, rng: Random) -> Arrays:
    values = {"shira_weight": np.zeros(_count(cfg, site), np.float32)}
    if cfg.random_seed is not None:
        return values
    mask = _mask(int(rng.integers(1 << 32)), site.out_features, site.in_features, _count(cfg, site))
    return {**values, "shira_indices": mask.astype(np.int32)}


def _constants(cfg: SHiRA, site: Site) -> Arrays:
    if cfg.random_seed is None:
        return {}
    require_widths(site)
    return {"shira_indices": _mask(cfg.random_seed, site.out_features, site.in_features, _count(cfg, site))}


def _require(cfg: SHiRA, params: Params, site: Site) -> None:
    if "shira_indices" in params:
        require_places(params["shira_indices"], (site.out_features, site.in_features))


_KEYS = PeftKeys(
    SHiRA,
    {"r": 32, "random_seed": None},
    {"mask_type": "random", "fan_in_fan_out": False, "init_weights": True},
)


def _from_peft_file(content: PeftContent) -> PeftContent:
    """Drops the seed if the file stores the positions: PEFT stores them even if it has a seed."""
    stored = any("shira_indices" in params for params in content.sites.values())
    return content.configure(random_seed=None) if stored else content


shira = METHODS.register(
    Method(
        name="shira",
        summary="trained values at a few places of the weight, which a seed draws",
        paper="https://arxiv.org/abs/2406.13175",
        formula="W' = W + S,  S sparse",
        config=SHiRA,
        traits=Traits(additive=True),
        shapes=_shapes,
        init=_init,
        normal_form=lambda cfg, params, site: NormalForm(
            down=Sparse(
                params["shira_weight"], params["shira_indices"], (site.out_features, site.in_features)
            )
        ),
        examples=(SHiRA(r=1), SHiRA(r=2, random_seed=5), SHiRA(r=1, random_seed=None)),
        storage=Storage(constants=_constants, require=_require),
        peft=_KEYS.form(
            peft_type="SHIRA", suffixes=("shira_weight", "shira_indices"), from_peft_file=_from_peft_file
        ),
    )
)
