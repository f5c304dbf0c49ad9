"""TinyLoRA: a handful of trained numbers between the singular vectors of the weight (Morris et al. 2026,
arXiv 2602.04118).

    y' = base(x) + B R A x,   R = sum_i v_i P_i,   A = sqrt(S_r) V_r^T,   B = U_r sqrt(S_r)   of   W = U S V^T

v has u numbers and may be shared by several layers; P ``[u, r, r]`` is drawn from N(0, 1/r) with the seed and
the layer's number, as PEFT draws it up to rounding. The signs of singular vectors differ between libraries;
here the largest entry of each row of A is positive. PEFT uses its own library's signs, so it can load only a
pack that stores A and B (``save_factors``), as PEFT itself does; ``convert --base`` adds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from ..errors import Unsupported
from . import (
    METHODS,
    MOST_SITES,
    NO_EXTRAS,
    TRANSPOSED,
    WEIGHTS,
    Arrays,
    Chain,
    Dense,
    Method,
    NormalForm,
    Params,
    PeftContent,
    PeftKeys,
    PeftLayer,
    PositiveInt,
    RankConfig,
    Seed,
    Shapes,
    Shared,
    Site,
    Storage,
    TorchGenerator,
    Traits,
    array_namespace,
    pattern_of,
)


@dataclass(frozen=True)
class TinyLoRA(RankConfig):
    """The hyper-parameters of TinyLoRA. ``weight_tying`` goes from 0, a vector for each layer, to 1, one for
    all.

    ``index`` is a site's number among the adapter's ``count`` sites, and ``indices`` holds it by path; None
    means that the site is the only one.

    Example:
        >>> TinyLoRA(r=2, u=13, weight_tying=1.0).rank
        2
    """

    r: PositiveInt = 2
    u: PositiveInt = 64
    weight_tying: Annotated[float, Meta(ge=0, le=1)] = 0.0
    projection_seed: Seed = 42
    save_factors: bool = False
    index: Annotated[int, Meta(ge=0, le=MOST_SITES)] | None = None
    count: Annotated[int, Meta(ge=1, le=MOST_SITES)] | None = None
    indices: Mapping[str, int] = pattern_of("index")

    @property
    def redundant(self) -> bool:
        """Whether the factors are stored, because PEFT reads only stored factors."""
        return self.save_factors


def _rank(cfg: TinyLoRA, site: Site) -> int:
    return min(cfg.r, site.in_features, site.out_features)


def _groups(cfg: TinyLoRA, count: int) -> int:
    return max(1, round(count * (1.0 - cfg.weight_tying)))


def _vector(cfg: TinyLoRA) -> str:
    """Returns the name of the vector that a site uses."""
    count = cfg.count or 1
    return (
        f"tinylora_v_{min((cfg.index or 0) // max(1, count // _groups(cfg, count)), _groups(cfg, count) - 1)}"
    )


def _resolve(configs: Sequence[Any], sites: Sequence[Site]) -> list[Any]:
    """Numbers the sites in the order of the model's modules."""
    if any(cfg.count is not None for cfg in configs):
        return list(configs)
    return [replace(cfg, index=index, count=len(sites)) for index, cfg in enumerate(configs)]


def _shapes(cfg: TinyLoRA, site: Site) -> Shapes:
    rank = _rank(cfg, site)
    return (
        {"tinylora_A": (rank, site.in_features), "tinylora_B": (site.out_features, rank)}
        if cfg.save_factors
        else {}
    )


def _vectors(cfg: TinyLoRA, sites: Sequence[Site]) -> Shapes:
    return {f"tinylora_v_{group}": (cfg.u,) for group in range(_groups(cfg, cfg.count or len(sites)))}


def _factors(cfg: TinyLoRA, site: Site) -> Arrays:
    """Computes A and B from the site's weight, with signs that do not depend on the library."""
    rank = _rank(cfg, site)
    left, values, right = np.linalg.svd(np.asarray(site.weight, np.float64), full_matrices=False)
    left = left[:, :rank]
    roots = np.sqrt(values[:rank])
    right = right[:rank]
    # Makes the largest entry of each right vector positive, because the signs differ between libraries.
    signs = np.sign(right[np.arange(rank), np.abs(right).argmax(axis=1)])
    return {
        "tinylora_A": ((signs * roots)[:, None] * right).astype(np.float32),
        "tinylora_B": (left * (signs * roots)).astype(np.float32),
    }


@lru_cache(maxsize=512)
def _projection(seed: int, u: int, rank: int) -> np.ndarray:
    return TorchGenerator(seed).normal((u, rank, rank), rank**-0.5)


def _constants(cfg: TinyLoRA, site: Site) -> Arrays:
    P = {"tinylora_P": _projection(cfg.projection_seed + (cfg.index or 0), cfg.u, _rank(cfg, site))}
    return P if cfg.save_factors else {**P, **_factors(cfg, site)}


def _normal_form(cfg: TinyLoRA, params: Params, site: Site) -> NormalForm:
    v = params[_vector(cfg)]
    P = params["tinylora_P"]
    xp = array_namespace(v)
    R = xp.reshape(v @ xp.reshape(P, (P.shape[0], -1)), P.shape[1:])
    return NormalForm(down=Chain(Dense(params["tinylora_A"]), Dense(R)), up=Dense(params["tinylora_B"]))


_KEYS = PeftKeys(
    TinyLoRA,
    ("r", "u", "weight_tying", "projection_seed", "dropout"),
    {**NO_EXTRAS, "save_projection": False, "init_v_bound": 0.02},
    renamed={"dropout": "tinylora_dropout"},
)


def _from_peft_file(content: PeftContent) -> PeftContent:
    """Determines the sites' numbers from the P that PEFT's file stores for each."""
    cfg = content.config
    count = len(content.sites)
    if (count == 1 or content.packed) and all(
        "tinylora_P" not in params for params in content.sites.values()
    ):
        return content
    indices = {}
    for path, params in content.sites.items():
        P = params.get("tinylora_P")
        if P is None or P.ndim != 3:
            raise Unsupported(
                "this file does not say in which order its layers come, on which their vectors depend",
                where=path,
                expected="tinylora_P",
                remedy="save it again with PEFT after setting save_projection=True in its config",
            )
        square = P.shape == (cfg.u, P.shape[1], P.shape[1])
        drawn = (
            index
            for index in range(count)
            if np.allclose(P, _projection(cfg.projection_seed + index, *P.shape[:2]), 0, 1e-5)
        )
        index = next(drawn, None) if square else None
        if index is None:
            raise Unsupported(
                "the stored tinylora_P is not that of projection_seed",
                where=path,
                remedy="merge this adapter with the library that made it",
            )
        indices[path] = index
    return content.configure(count=count, indices=indices).change_sites(
        lambda params: {name: value for name, value in params.items() if name != "tinylora_P"}
    )


tinylora = METHODS.register(
    Method(
        name="tinylora",
        summary="a handful of trained numbers between the singular vectors of the weight",
        paper="https://arxiv.org/abs/2602.04118",
        formula="y' = W x + b + U_r S_r^(1/2) (sum_i v_i P_i) S_r^(1/2) V_r^T x",
        config=TinyLoRA,
        traits=Traits(
            additive=True,
            low_rank=True,
            reads_weight=True,
            frozen=("tinylora_A", "tinylora_B"),
            layers=(*WEIGHTS, "table"),
        ),
        shapes=_shapes,
        init=lambda cfg, site, rng: _factors(cfg, site) if cfg.save_factors else {},
        normal_form=_normal_form,
        examples=(
            TinyLoRA(r=1, u=3),
            TinyLoRA(r=3, u=17, projection_seed=5, dropout=0.1),
            TinyLoRA(r=2, u=4, save_factors=True),
        ),
        storage=Storage(
            constants=_constants,
            expanded_size=lambda cfg, site: cfg.u * _rank(cfg, site) ** 2,
            shared=Shared(
                _vectors,
                lambda cfg, sites, rng: {
                    name: np.zeros(shape, np.float32) for name, shape in _vectors(cfg, sites).items()
                },
            ),
            resolve=_resolve,
        ),
        peft=_KEYS.form(
            peft_type="TINYLORA",
            suffixes=("tinylora_A", "tinylora_B", "tinylora_P"),
            layers={"table": PeftLayer(), **TRANSPOSED},
            to_config=lambda sites: (
                _KEYS.to_config(sites) if next(iter(sites.values())).save_factors else None
            ),
            from_config=lambda config: replace(_KEYS.from_config(config), save_factors=True),
            features=lambda params: (
                (params["tinylora_A"].shape[1], params["tinylora_B"].shape[0]) if params else (None, None)
            ),
            shared={"tinylora_v": "base_model.tinylora_v"},
            from_peft_file=_from_peft_file,
            # adds A and B: PEFT uses the factors of its file whatever signs it would have computed
            to_peft_with_base=lambda cfg, params, site, factorise: (
                replace(cfg, save_factors=True),
                {**_factors(cfg, site), **params},
            ),
        ),
    )
)
