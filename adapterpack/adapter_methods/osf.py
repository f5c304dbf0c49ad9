"""OSF: trains the smallest singular directions of a weight, kept orthogonal to the largest (arXiv 2504.07097,
section 3).

    W' = W - U_0 S_0 V_0 + U S V,   W = U_high S_high V_high + U_0 S_0 V_0

U ``[out, k]``, S ``[k]`` and V ``[k, in]`` start as U_0, S_0 and V_0, the directions of the k smallest
singular values. ``effective_rank`` is the number of directions that stay fixed, absolute or as a share of the
smaller width; the default is half. Gradients of U and V are projected off U_high and V_high, as in PEFT. U_0
S_0 V_0 is recomputed from the weight in float32 wherever the adapter is used: as a product it does not depend
on the signs that a library chooses, only on a gap between the singular values at the cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import (
    METHODS,
    WEIGHTS,
    Array,
    Arrays,
    Dense,
    Method,
    NormalForm,
    Params,
    PeftConfig,
    PeftContent,
    PeftForm,
    Random,
    Shapes,
    Site,
    SiteConfig,
    SiteConfigs,
    Storage,
    Traits,
    array_namespace,
    constant,
    pattern_of,
    require_whole,
    widths_of,
)
from .peft.keys import default_and_pattern


@dataclass(frozen=True)
class OSF(SiteConfig):
    """The hyper-parameters of OSF: a number of kept directions, or a share of them below 1. ``rank_pattern``
    says it by site.

    Example:
        >>> OSF(effective_rank=0.75, rank_pattern={"v_proj": 16}).at("layers.0.v_proj").effective_rank
        16
    """

    effective_rank: float | None = None
    rank_pattern: Mapping[str, float] = pattern_of("effective_rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "effective_rank", _share_or_number(self.effective_rank))
        object.__setattr__(
            self, "rank_pattern", {name: _share_or_number(value) for name, value in self.rank_pattern.items()}
        )


def _share_or_number(value: Any) -> Any:
    """Returns a share below 1 unchanged and other values as integers: a YAML file may write 8 as 8.0."""
    if value is None or (isinstance(value, float) and 0 < value < 1):
        return value
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    require_whole("effective_rank", number, 0)
    return number


def _count_kept(cfg: OSF, site: Site) -> int:
    """Returns how many directions stay fixed, such that at least one is trained."""
    most = min(site.out_features, site.in_features)
    wanted = cfg.effective_rank
    kept = most // 2 if wanted is None else int(most * wanted) if isinstance(wanted, float) else wanted
    return min(kept, most - 1)


def _shapes(cfg: OSF, site: Site) -> Shapes:
    k = min(site.out_features, site.in_features) - _count_kept(cfg, site)
    return {"osf_U": (site.out_features, k), "osf_S": (k,), "osf_V": (k, site.in_features)}


def _parts(cfg: OSF, site: Site) -> Arrays:
    U, S, V = np.linalg.svd(np.asarray(site.weight, np.float32), full_matrices=False)
    kept = _count_kept(cfg, site)
    return {"U_high": U[:, :kept], "V_high": V[:kept], "U_0": U[:, kept:], "S_0": S[kept:], "V_0": V[kept:]}


def _init(cfg: OSF, site: Site, rng: Random) -> Arrays:
    parts = _parts(cfg, site)
    return {f"osf_{name}": np.ascontiguousarray(parts[f"{name}_0"]) for name in ("U", "S", "V")}


def _normal_form(cfg: OSF, params: Params, site: Site) -> NormalForm:
    U = _apart(params["osf_U"], params["U_high"])
    V = _apart(params["osf_V"].T, params["V_high"].T).T
    xp = array_namespace(U, V)
    scaled = U * params["osf_S"]
    start = params["U_0"] * params["S_0"]
    # (U S) V - (U_0 S_0) V_0 as two differences, which are exactly zero at the start, without rounding errors
    return NormalForm(
        down=Dense(xp.concat([V, V - params["V_0"]], axis=0)),
        up=Dense(xp.concat([scaled - start, start], axis=1)),
    )


def _apart(trained: Array, kept: Array) -> Array:
    """Returns ``trained`` ``[n, k]`` unchanged in value, with its gradient projected off the orthonormal
    columns of ``kept``.
    """
    value = constant(trained)
    if value is trained:
        return trained
    free = trained - kept @ (kept.T @ trained)
    # The value of `trained` with the gradient of `free`: their difference adds zero to the value.
    return value + (free - constant(free))


def _to_peft(sites: SiteConfigs) -> PeftConfig:
    default, others = default_and_pattern(
        {path: cfg.effective_rank for path, cfg in sites.items()}, anchored=True
    )
    # PEFT searches for a pattern anywhere in a path
    pattern = {f"^{re.escape(path.removeprefix('^'))}$": value for path, value in others.items()}
    return {
        "effective_rank": default,
        "rank_pattern": pattern,
        "init_weights": True,
        "target_svd_config": None,
    }


def _from_peft_file(content: PeftContent) -> PeftContent:
    """Reads the ranks from the tensors, because PEFT's patterns may match anywhere in a path."""
    found = {}
    for path, params in content.sites.items():
        U, V = (params.get(name, np.empty(0)) for name in ("osf_U", "osf_V"))
        site = Site(path, V.shape[1], U.shape[0])
        if _shapes(content.config, site)["osf_U"] != U.shape:
            found[f"^{path}"] = min(V.shape[1], U.shape[0]) - U.shape[1]
    return content.configure(rank_pattern=found)


osf = METHODS.register(
    Method(
        name="osf",
        summary="the smallest singular directions of a weight are trained, apart from the largest",
        paper="https://arxiv.org/abs/2504.07097",
        formula="W' = W - U_0 S_0 V_0 + U S V,  U_0 S_0 V_0 the smallest terms of W",
        config=OSF,
        traits=Traits(reads_weight=True, layers=WEIGHTS),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(OSF(), OSF(effective_rank=0.25)),
        storage=Storage(
            constants=_parts,
            expanded_size=lambda cfg, site: (
                min(site.out_features, site.in_features) * (site.out_features + site.in_features + 1)
            ),
        ),
        peft=PeftForm(
            peft_type="OSF",
            suffixes={f"osf_{name}": f"osf_svd_params.{name}_low" for name in ("U", "S", "V")},
            to_config=_to_peft,
            from_config=lambda config: OSF(effective_rank=config.get("effective_rank")),
            features=widths_of("osf_V", "osf_U"),
            from_peft_file=_from_peft_file,
            peft_supports=lambda cfg, site: _count_kept(cfg, site) > 0,
        ),
    )
)
