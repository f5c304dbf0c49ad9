"""MiSS mini: a block of MiSS that is repeated over the outputs (Kang et al. 2024, arXiv 2409.15371; PEFT's
``init_weights="mini"``).

    y' = base(x) + repeat(sum_blocks(x) M)

M is ``[r, mini_r]``; its result is repeated over all outputs (and cut off if mini_r does not divide their
number, which PEFT refuses).
"""

from __future__ import annotations

from dataclasses import dataclass

from . import (
    METHODS,
    BlockSums,
    Chain,
    Dense,
    Method,
    NormalForm,
    Params,
    PositiveInt,
    RankConfig,
    Repeat,
    Shapes,
    Site,
    Storage,
    Traits,
    require_widths,
    zeros,
)
from .miss import is_miss, miss_keys


@dataclass(frozen=True)
class MiSSMini(RankConfig):
    """The hyper-parameters of MiSS mini: ``mini_r`` is the width of the block.

    Example:
        >>> MiSSMini(r=64, mini_r=8).rank
        64
    """

    mini_r: PositiveInt = 1


def _shapes(cfg: MiSSMini, site: Site) -> Shapes:
    return {"miss_block": (cfg.r, cfg.mini_r)}


def _normal_form(cfg: MiSSMini, params: Params, site: Site) -> NormalForm:
    require_widths(site)
    block = params["miss_block"]
    return NormalForm(
        down=Chain(BlockSums(site.in_features, cfg.r, block), Dense(block.T)),
        up=Repeat(cfg.mini_r, site.out_features, block),
    )


miss_mini = METHODS.register(
    Method(
        name="miss_mini",
        summary="MiSS with a block that is repeated over the outputs",
        paper="https://arxiv.org/abs/2409.15371",
        formula="y' = W x + b + repeat(M sum_blocks(x))",
        config=MiSSMini,
        traits=Traits(additive=True, low_rank=True),
        shapes=_shapes,
        init=zeros(_shapes),
        normal_form=_normal_form,
        examples=(MiSSMini(r=2), MiSSMini(r=5, mini_r=3, dropout=0.1)),
        storage=Storage(
            expanded_size=lambda cfg, site: (cfg.r + cfg.mini_r) * (site.in_features + site.out_features)
        ),
        peft=miss_keys(MiSSMini, "mini_r", init_weights="mini").form(
            peft_type="MISS",
            suffixes=("miss_block",),
            matches=lambda config: is_miss(config, "mini"),
            aliases={"bone_block": "miss_block"},
        ),
    )
)
