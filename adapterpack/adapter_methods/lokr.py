"""LoKr: a change that is a Kronecker product (Edalati et al. 2022, KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859).

    W' = W + s kron(w1, w2),   s = alpha / r

w1 is ``[a, b]`` and w2 ``[out / a, in / b]``; a and b divide the widths and are about ``decompose_factor``, or about the widths' roots
where it is -1. A factor that rank r makes smaller is stored as two, ``w_a w_b``: w2, and w1 where ``decompose_both`` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .core.arrays import array_namespace
from .core.base import Method, NormalForm, Traits
from .core.config import AlphaConfig, require_flag, require_whole
from .core.layouts import STACKS, WEIGHTS
from .core.operators import Array, Kronecker
from .core.peft_form import PeftForm
from .core.site import Params, Site
from .loha import from_peft, kaiming, to_peft
from .registry import METHODS


@dataclass(frozen=True)
class LoKr(AlphaConfig):
    """The hyper-parameters of LoKr; ``alpha`` defaults to ``2 r``.

    Example:
        >>> LoKr(r=4, alpha=4).scale
        1.0
    """

    decompose_both: bool = False
    decompose_factor: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag("decompose_both", self.decompose_both)
        if self.decompose_factor != -1:
            require_whole("decompose_factor", self.decompose_factor)


def divided(width: int, factor: int) -> tuple[int, int]:
    """``width`` as a product of two numbers, the smaller first (unless it is ``factor`` itself): as near as its divisors allow to
    ``factor``, from below, or to the root, where ``factor`` is -1.

    Example:
        >>> divided(128, -1), divided(128, 4), divided(128, 64), divided(127, -1)
        ((8, 16), (4, 32), (64, 2), (1, 127))
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = width if factor == -1 else factor
    small = max((n for n in range(1, int(width**0.5) + 1) if width % n == 0 and n <= most), default=1)
    return small, width // small


def _shapes(cfg: LoKr, site: Site) -> dict[str, tuple[int, ...]]:
    (b, d), (a, c) = divided(site.in_features, cfg.decompose_factor), divided(site.out_features, cfg.decompose_factor)
    split1, split2 = cfg.decompose_both and 2 * cfg.r < max(a, b), 2 * cfg.r < max(c, d)
    first = {"lokr_w1_a": (a, cfg.r), "lokr_w1_b": (cfg.r, b)} if split1 else {"lokr_w1": (a, b)}
    second = {"lokr_w2_a": (c, cfg.r), "lokr_w2_b": (cfg.r, d)} if split2 else {"lokr_w2": (c, d)}
    return {**first, **second}


def _init(cfg: LoKr, site: Site, rng: np.random.Generator) -> dict[str, np.ndarray]:
    zero = {"lokr_w1", "lokr_w1_a"}
    return {name: np.zeros(shape, np.float32) if name in zero else kaiming(rng, shape) for name, shape in _shapes(cfg, site).items()}


def _factor(params: Params, name: str) -> Array:
    if name in params:
        return params[name]
    left, right = params[f"{name}_a"], params[f"{name}_b"]
    return array_namespace(left, right).matmul(left, right)


def _normal_form(cfg: LoKr, params: Params, site: Site) -> NormalForm:
    return NormalForm(down=Kronecker(cfg.scale * _factor(params, "lokr_w1"), _factor(params, "lokr_w2")))


def _to_peft(sites: Mapping[str, Any]) -> dict[str, Any]:
    first: LoKr = next(iter(sites.values()))
    return {**to_peft(sites), "decompose_both": first.decompose_both, "decompose_factor": first.decompose_factor,
            "rank_dropout_scale": False}


def _features(params: Params) -> tuple[int, int]:
    def sides(name: str) -> tuple[int, int]:
        whole = params.get(name)
        shape = (params[f"{name}_a"].shape[0], params[f"{name}_b"].shape[1]) if whole is None else whole.shape
        return shape[0], shape[1]

    (a, b), (c, d) = sides("lokr_w1"), sides("lokr_w2")
    return b * d, a * c


lokr = METHODS.register(Method(
    name="lokr",
    summary="a change that is the Kronecker product of two small matrices",
    paper="https://arxiv.org/abs/2309.14859",
    formula="W' = W + s kron(w1, w2)",
    config=LoKr,
    traits=Traits(additive=True, identity_at_init=True, row_separable=True, low_rank=False,
                  layers=(*WEIGHTS, "embedding", *STACKS)),
    shapes=_shapes,
    init=_init,
    normal_form=_normal_form,
    examples=(LoKr(r=8), LoKr(r=1, alpha=3), LoKr(r=1, alpha=2, decompose_both=True, decompose_factor=4), LoKr(r=2, decompose_factor=3)),
    peft=PeftForm(
        peft_type="LOKR",
        suffixes={name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
        to_config=_to_peft,
        from_config=lambda config: LoKr(**from_peft(config), decompose_both=config.get("decompose_both", False),
                                        decompose_factor=config.get("decompose_factor", -1)),
        features=_features,
    ),
))
