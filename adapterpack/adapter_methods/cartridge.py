"""Cartridges: the trained KV cache of a corpus, whose first tokens stay frozen (Eyuboglu et al. 2025, arXiv
2506.06266, section 3).

    K_l' = [S_l,0; P_l,0; K_l],   V_l' = [S_l,1; P_l,1; V_l]

S, which models use as an attention sink, has ``num_frozen_tokens`` tokens and is never trained; P is the rest
of the ``n`` virtual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from . import (
    METHODS,
    Arrays,
    Method,
    NonNegativeInt,
    Params,
    PeftConfig,
    PromptForm,
    Random,
    Shapes,
    Site,
    Storage,
    array_namespace,
    constant,
    normal,
)
from .forms.prompt import STORED, CacheConfig, as_cache, cache_fields, peft_form, prefill, traits

_SINK = "frozen_embedding"


@dataclass(frozen=True, kw_only=True)
class Cartridge(CacheConfig):
    """``init``: ``text``, what the base makes of the first tokens of ``text``/``token_ids``, or ``random``
    (normal).

    ``baked`` means that sink and rest are one tensor, as packs store them.

    Example:
        >>> Cartridge(num_virtual_tokens=64, text="...").num_frozen_tokens
        1
    """

    init: Literal["random", "text"] = "text"
    num_frozen_tokens: NonNegativeInt = 1
    baked: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frozen_tokens >= self.num_virtual_tokens:
            raise ValueError(
                f"num_frozen_tokens {self.num_frozen_tokens} leaves none of {self.num_virtual_tokens} "
                "virtual tokens to train"
            )

    @property
    def frozen(self) -> frozenset[str]:
        """The keys and values of the first tokens. No seed reproduces them, so a pack stores them."""
        return frozenset({_SINK})


def _shapes(cfg: Cartridge, site: Site) -> Shapes:
    wide = cfg.width(site)
    if cfg.baked or not cfg.num_frozen_tokens:
        return {STORED: (cfg.num_virtual_tokens, wide)}
    return {
        _SINK: (cfg.num_frozen_tokens, wide),
        STORED: (cfg.num_virtual_tokens - cfg.num_frozen_tokens, wide),
    }


def _init(cfg: Cartridge, site: Site, rng: Random) -> Arrays:
    shape = (cfg.num_virtual_tokens, cfg.width(site))
    whole = prefill(cfg, site) if cfg.init == "text" else normal(rng, shape, 1)
    sink = cfg.num_frozen_tokens
    return {_SINK: whole[:sink], STORED: whole[sink:]} if sink else {STORED: whole}


def _normal_form(cfg: Cartridge, params: Params, site: Site) -> PromptForm:
    rest = params[STORED]
    sink = params.get(_SINK)
    if sink is None and cfg.num_frozen_tokens:
        # A pack stores sink and rest as one tensor; further training must still leave the sink alone.
        sink = constant(rest[: cfg.num_frozen_tokens, ...])
        rest = rest[cfg.num_frozen_tokens :, ...]
    flat = rest if sink is None else array_namespace(rest).concat([sink, rest], axis=0)
    return PromptForm(cache=as_cache(flat, cfg.sizes(site)))


def _to_pack(cfg: Cartridge, params: Params, site: Site) -> tuple[Cartridge, Arrays]:
    parts = [params[name] for name in (_SINK, STORED) if name in params]
    return cfg.with_sizes(site, baked=True), {STORED: np.concatenate(parts).astype(np.float32)}


def _from_peft(config: PeftConfig) -> Cartridge:
    frozen = config.get("num_frozen_tokens", 1)
    return Cartridge(**cache_fields(config), num_frozen_tokens=frozen, baked=True)


cartridge = METHODS.register(
    Method(
        name="cartridge",
        summary="the trained cache of a text, whose first tokens stay frozen",
        paper="https://arxiv.org/abs/2506.06266",
        formula="K' = [S; P; K],  V' = [S; P; V],  S frozen",
        kind="prompt",
        config=Cartridge,
        traits=traits((_SINK,)),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            Cartridge(num_virtual_tokens=3, token_ids=(4, 5, 6, 7)),
            Cartridge(num_virtual_tokens=4, num_frozen_tokens=2, init="random"),
            Cartridge(num_virtual_tokens=2, num_frozen_tokens=0, init="random"),
        ),
        storage=Storage(to_stored=_to_pack),
        peft=peft_form(
            "CARTRIDGE", lambda cfg: {"num_frozen_tokens": cfg.num_frozen_tokens}, _from_peft, wide=False
        ),
    )
)
