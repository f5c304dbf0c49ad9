"""LoRA: a low-rank change beside a frozen linear layer (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    y' = base(x) + s * B (A x),   s = alpha / r,  or  alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)

A has shape [r, in], B has shape [out, r].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import Unsupported
from .base import AttachForm, Method, Params, PeftForm, Site, Traits
from .config import AlphaConfig, require_flag, require_number
from .operators import Dense
from .peft_keys import by_site, literal, plain


@dataclass(frozen=True)
class LoRA(AlphaConfig):
    """The hyper-parameters of LoRA; ``alpha`` defaults to ``2 r``.

    ``lr_ratio`` trains B at that multiple of A's learning rate (LoRA+, Hayou et al. 2024, arXiv 2402.12354, section 4).

    Example:
        >>> LoRA(r=8, alpha=16).scale
        2.0
        >>> LoRA(r=4, use_rslora=True, alpha=4).scale
        2.0
    """

    use_rslora: bool = False
    lr_ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag("use_rslora", self.use_rslora)
        if self.lr_ratio is not None:
            require_number("lr_ratio", self.lr_ratio)
            if self.lr_ratio <= 0:
                raise ValueError(f"lr_ratio must be above 0, not {self.lr_ratio!r}")

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies ``B A``."""
        return float(self.alpha or 0.0) / (math.sqrt(self.r) if self.use_rslora else self.r)


def _shapes(cfg: LoRA, site: Site) -> dict[str, tuple[int, ...]]:
    return {"lora_A": (cfg.r, site.in_features), "lora_B": (site.out_features, cfg.r)}


def _init(cfg: LoRA, site: Site, rng: np.random.Generator) -> dict[str, np.ndarray]:
    bound = 1 / math.sqrt(site.in_features)  # Kaiming uniform with a = sqrt(5), as the reference implementation has it
    A = rng.uniform(-bound, bound, (cfg.r, site.in_features)).astype(np.float32)
    return {"lora_A": A, "lora_B": np.zeros((site.out_features, cfg.r), np.float32)}


def _attach(cfg: LoRA, params: Params, site: Site) -> AttachForm:
    return AttachForm(down=Dense(params["lora_A"]), up=Dense(cfg.scale * params["lora_B"]))


def _to_peft(sites: Mapping[str, Any]) -> dict[str, Any]:
    first: LoRA = next(iter(sites.values()))

    def alpha(cfg: LoRA) -> float:
        """PEFT has one ``use_rslora`` for all sites: where a site's own differs, the alpha that gives the same scale."""
        same = cfg.use_rslora == first.use_rslora
        value = float(cfg.alpha or 0) if same else cfg.scale * (math.sqrt(cfg.r) if first.use_rslora else cfg.r)
        return plain(value)

    return {
        **by_site("r", {path: cfg.r for path, cfg in sites.items()}, "rank_pattern"),
        **by_site("lora_alpha", {path: alpha(cfg) for path, cfg in sites.items()}, "alpha_pattern"),
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's initialisations that leave the base weight alone. The others move a part of it into the adapter."""


def _from_peft(config: Mapping[str, Any]) -> LoRA:
    init = config.get("init_lora_weights")
    if init not in _KEEPS_BASE:
        raise Unsupported("this adapter belongs to a base whose weights its initialisation rewrote", where="init_lora_weights",
                          expected="an initialisation that keeps the base", found=repr(init)[:80],
                          remedy="convert it to plain LoRA with save_pretrained(..., path_initial_model_for_weight_conversion=...)")
    return LoRA(
        r=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        use_rslora=config.get("use_rslora", False),
        dropout=config.get("lora_dropout", 0.0),
        rank_pattern=literal(config.get("rank_pattern"), "rank_pattern"),
        alpha_pattern=literal(config.get("alpha_pattern"), "alpha_pattern"),
    )


lora = Method(
    name="lora",
    summary="a trained low-rank change beside each frozen linear layer; rsLoRA by use_rslora",
    paper="https://arxiv.org/abs/2106.09685",
    config=LoRA,
    traits=Traits(additive=True, identity_at_init=True, row_separable=True, low_rank=True),
    shapes=_shapes,
    init=_init,
    attach=_attach,
    rates=lambda cfg: {} if cfg.lr_ratio is None else {"lora_B": cfg.lr_ratio},
    examples=(LoRA(r=1), LoRA(r=3, alpha=5), LoRA(r=4, alpha=4, use_rslora=True), LoRA(r=5, alpha=10, dropout=0.1)),
    peft=PeftForm(
        peft_type="LORA",
        suffixes={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
        to_config=_to_peft,
        from_config=_from_peft,
        features=lambda params: (params["lora_A"].shape[1], params["lora_B"].shape[0]),
        matches=lambda config: config.get("peft_type") == "LORA" and not config.get("use_dora") and not config.get("kasa_config"),
    ),
)
