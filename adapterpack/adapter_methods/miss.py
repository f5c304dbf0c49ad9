"""MiSS, formerly Bone: one trained block of rows that all blocks of the input share (Kang et al. 2024, arXiv
2409.15371).

    y' = base(x) + sum_blocks(x) M

x is divided into blocks of r (the last one padded with zeros), and the blocks are summed; M is ``[r, out]``.
:mod:`.miss_mini` has a smaller M, and :mod:`.bat` is the variant that reads the weight; PEFT has one type for
all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import (
    METHODS,
    BlockSums,
    Dense,
    Method,
    NormalForm,
    Params,
    PeftConfig,
    PeftKeys,
    RankConfig,
    Shapes,
    Site,
    Traits,
    require_widths,
    zeros,
)


@dataclass(frozen=True)
class MiSS(RankConfig):
    """The hyper-parameters of MiSS.

    Example:
        >>> MiSS(r=64).rank
        64
    """


def _shapes(cfg: MiSS, site: Site) -> Shapes:
    return {"miss_block": (cfg.r, site.out_features)}


def _normal_form(cfg: MiSS, params: Params, site: Site) -> NormalForm:
    require_widths(site)
    block = params["miss_block"]
    return NormalForm(down=BlockSums(site.in_features, cfg.r, block), up=Dense(block.T))


def miss_keys(config: type[Any], *fields: str, **constants: Any) -> PeftKeys:
    """Returns PEFT's keys for a method of this family; PEFT has one rank for all sites."""
    usual = {"r": 64, "dropout": 0.0, **dict.fromkeys(fields, 1)}
    written = {"mini_r": 1, "init_weights": True, "bias": "none", **constants}
    return PeftKeys(
        config,
        usual,
        {key: value for key, value in written.items() if key not in fields},
        renamed={"dropout": "miss_dropout"},
    )


def is_miss(config: PeftConfig, variant: str | None) -> bool:
    """Whether a PEFT config is MiSS (or Bone, its former name) in that variant; other values of
    ``init_weights`` only say how M started.
    """
    init = config.get("init_weights")
    return (
        config.get("peft_type") in ("MISS", "BONE") and (init if init in ("bat", "mini") else None) == variant
    )


miss = METHODS.register(
    Method(
        name="miss",
        summary="one trained block of rows shared by all blocks of the input",
        paper="https://arxiv.org/abs/2409.15371",
        formula="y' = W x + b + M sum_blocks(x)",
        config=MiSS,
        traits=Traits(additive=True, low_rank=True),
        shapes=_shapes,
        init=zeros(_shapes),
        normal_form=_normal_form,
        examples=(MiSS(r=2), MiSS(r=5, dropout=0.1)),
        peft=miss_keys(MiSS).form(
            peft_type="MISS",
            suffixes=("miss_block",),
            features=lambda params: (None, params["miss_block"].shape[1]),
            matches=lambda config: is_miss(config, None),
            aliases={"bone_block": "miss_block"},
        ),
    )
)
