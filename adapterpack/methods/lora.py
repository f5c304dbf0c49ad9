"""LoRA: a low-rank change beside a frozen linear layer (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    y' = base(x) + s * B (A x),   s = alpha / r,  or  alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)

A has shape [r, in], B has shape [out, r].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .base import AttachForm, Method, Params, PeftForm, Site, Traits
from .operators import Dense


@dataclass(frozen=True)
class LoRA:
    """The hyper-parameters of LoRA; ``alpha`` defaults to ``2 r``.

    Example:
        >>> LoRA(r=8, alpha=16).scale
        2.0
        >>> LoRA(r=4, use_rslora=True, alpha=4).scale
        2.0
    """

    r: int = 8
    alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, not {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.r)

    def at(self, path: str) -> LoRA:
        """The config at one site: rank and alpha looked up by the literal path or its last components."""
        rank, alpha = _by_suffix(self.rank_pattern, path, self.r), _by_suffix(self.alpha_pattern, path, self.alpha)
        return replace(self, r=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies ``B A``."""
        return float(self.alpha or 0.0) / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def rank(self) -> int:
        """The inner dimension of ``B A``."""
        return self.r


def _by_suffix(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    matches = [key for key in pattern if path == key or path.endswith("." + key)]
    return pattern[max(matches, key=len)] if matches else default


def _shapes(cfg: LoRA, site: Site) -> dict[str, tuple[int, ...]]:
    return {"lora_A": (cfg.r, site.in_features), "lora_B": (site.out_features, cfg.r)}


def _init(cfg: LoRA, site: Site, rng: np.random.Generator) -> dict[str, np.ndarray]:
    bound = 1 / math.sqrt(site.in_features)  # Kaiming uniform with a = sqrt(5), as the reference implementation has it
    A = rng.uniform(-bound, bound, (cfg.r, site.in_features)).astype(np.float32)
    return {"lora_A": A, "lora_B": np.zeros((site.out_features, cfg.r), np.float32)}


def _attach(cfg: LoRA, params: Params, site: Site) -> AttachForm:
    return AttachForm(down=Dense(params["lora_A"]), up=Dense(cfg.scale * params["lora_B"]))


def _to_peft(sites: Mapping[str, Any]) -> dict[str, Any]:
    configs = list(sites.values())
    first: LoRA = configs[0]
    return {
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {path: cfg.r for path, cfg in sites.items() if cfg.r != first.r},
        "alpha_pattern": {path: cfg.alpha for path, cfg in sites.items() if cfg.alpha != first.alpha},
    }


def _from_peft(config: Mapping[str, Any]) -> LoRA:
    return LoRA(
        r=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        use_rslora=config.get("use_rslora", False),
        dropout=config.get("lora_dropout", 0.0),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
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
    examples=(LoRA(r=1), LoRA(r=3, alpha=5), LoRA(r=4, alpha=4, use_rslora=True), LoRA(r=5, alpha=10, dropout=0.1)),
    peft=PeftForm(
        peft_type="LORA",
        suffixes={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
        to_config=_to_peft,
        from_config=_from_peft,
        features=lambda params: (params["lora_A"].shape[1], params["lora_B"].shape[0]),
    ),
)
