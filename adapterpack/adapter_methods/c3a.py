"""C3A: a change made of circulant blocks (Chen et al. 2024, arXiv 2407.19342, section 3).

    W' = W + C / in,   C [out, in] of blocks [b, b]; each row of a block is the row above shifted by one place

One row of b numbers is trained per block. The rows start at zero, so that a fresh adapter changes nothing;
PEFT's default starts them at random. PEFT feeds a second active adapter with the output of the first
(peft#3164); here adapters are independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from . import (
    METHODS,
    BlockCirculant,
    Method,
    NormalForm,
    Params,
    PeftKeys,
    PositiveInt,
    Shapes,
    Site,
    SiteConfig,
    Storage,
    Traits,
    pattern_of,
    zeros,
)


@dataclass(frozen=True)
class C3A(SiteConfig):
    """The hyper-parameters of C3A; where ``block_size`` does not divide both widths, the largest common
    divisor of the three does.

    Example:
        >>> C3A(block_size=256, block_size_pattern={"v_proj": 64}).at("layers.0.v_proj").block_size
        64
    """

    block_size: PositiveInt = 256
    block_size_pattern: Mapping[str, int] = pattern_of("block_size")


def _shapes(cfg: C3A, site: Site) -> Shapes:
    size = math.gcd(cfg.block_size, site.in_features, site.out_features)
    return {"c3a_kernel": (site.out_features // size, site.in_features // size, size)}


def _features(params: Params) -> tuple[int, int]:
    tall, wide, size = params["c3a_kernel"].shape
    return wide * size, tall * size


_KEYS = PeftKeys(C3A, ("block_size",), {"bias": "none", "init_weights": True}, anchored=False)

c3a = METHODS.register(
    Method(
        name="c3a",
        summary="circulant blocks, each one trained row of numbers",
        paper="https://arxiv.org/abs/2407.19342",
        formula="W' = W + C / in,  C of circulant blocks",
        config=C3A,
        traits=Traits(additive=True),
        shapes=_shapes,
        init=zeros(_shapes),
        normal_form=lambda cfg, params, site: NormalForm(
            down=BlockCirculant(params["c3a_kernel"] / site.in_features)
        ),
        examples=(C3A(block_size=1), C3A(block_size=35), C3A(block_size=36)),
        # a pack has the block size actually used: PEFT refuses a size that does not divide a layer
        storage=Storage(
            resolve=lambda configs, sites: [
                replace(cfg, block_size=math.gcd(cfg.block_size, site.in_features, site.out_features))
                for cfg, site in zip(configs, sites, strict=True)
            ]
        ),
        peft=_KEYS.form(peft_type="C3A", suffixes=("c3a_kernel",), features=_features),
    )
)
