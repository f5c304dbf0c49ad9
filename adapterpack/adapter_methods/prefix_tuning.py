"""Prefix tuning: trained keys and values before those of the first token, in every layer (Li & Liang 2021,
arXiv 2101.00190, section 4).

    K_l' = [P_l,0; K_l],   V_l' = [P_l,1; V_l],   P [layers, 2, heads, n, head_dim]

With ``projection`` a small network computes P, ``W2 tanh(W1 E + b1) + b2`` (section 4.3); a pack stores only
its result.
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
    PromptForm,
    Random,
    Shapes,
    Site,
    Storage,
    array_namespace,
    normal,
)
from .forms.prompt import (
    STORED,
    CacheConfig,
    as_cache,
    as_flat,
    cache_fields,
    linear,
    peft_form,
    prefill,
    traits,
    uniform,
)


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(CacheConfig):
    """``init``: ``random`` (normal), ``zero``, or ``text``: what the base makes of the first tokens of
    ``text``/``token_ids``.

    ``projection`` trains through a network of width ``encoder_hidden`` (0: the width of the keys); ``baked``
    means that the network was dropped.

    Example:
        >>> PrefixTuning(num_virtual_tokens=8, num_layers=2, num_heads=2, head_dim=4).width(Site("@prompt", 0,
        ...     0, "prompt"))
        32
    """

    init: Literal["random", "zero", "text"] = "random"
    projection: bool = False
    encoder_hidden: NonNegativeInt = 0
    baked: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection and self.init == "text":
            raise ValueError(
                "a projection cannot be made to give the keys and values of a text: leave out one of them"
            )

    @property
    def projects(self) -> bool:
        """Whether the config still has the network."""
        return self.projection and not self.baked


def _shapes(cfg: PrefixTuning, site: Site) -> Shapes:
    wide = cfg.width(site)
    (_, heads, head_dim) = cfg.sizes(site)
    if not cfg.projects:
        return {STORED: (cfg.num_virtual_tokens, wide)}
    narrow = heads * head_dim
    hidden = cfg.encoder_hidden or narrow
    return {
        STORED: (cfg.num_virtual_tokens, narrow),
        "down_weight": (hidden, narrow),
        "down_bias": (hidden,),
        "up_weight": (wide, hidden),
        "up_bias": (wide,),
    }


def _init(cfg: PrefixTuning, site: Site, rng: Random) -> Arrays:
    if cfg.init == "text":
        return {STORED: prefill(cfg, site)}
    shapes = _shapes(cfg, site)
    made = {STORED: normal(rng, shapes[STORED], 1)}
    for name in ("down", "up") if cfg.projects else ():
        fan_in = shapes[f"{name}_weight"][1]
        made |= {
            f"{name}_{leaf}": uniform(rng, fan_in, shapes[f"{name}_{leaf}"]) for leaf in ("weight", "bias")
        }
    last = {"up_weight", "up_bias"} if cfg.projects else {STORED}
    zero = last if cfg.init == "zero" else set()
    return {name: np.zeros_like(value) if name in zero else value for name, value in made.items()}


def _normal_form(cfg: PrefixTuning, params: Params, site: Site) -> PromptForm:
    flat = params[STORED]
    if cfg.projects:
        flat = linear(array_namespace(flat).tanh(linear(flat, params, "down")), params, "up")
    return PromptForm(cache=as_cache(flat, cfg.sizes(site)))


def _to_pack(cfg: PrefixTuning, params: Params, site: Site) -> tuple[PrefixTuning, Arrays]:
    flat = as_flat(np.asarray(_normal_form(cfg, params, site).cache))
    return cfg.with_sizes(site, baked=True), {STORED: np.asarray(flat, np.float32)}


prefix_tuning = METHODS.register(
    Method(
        name="prefix_tuning",
        summary="trained keys and values before those of the first token, in every layer",
        paper="https://arxiv.org/abs/2101.00190",
        formula="K' = [P_K; K],  V' = [P_V; V] in every layer",
        kind="prompt",
        config=PrefixTuning,
        traits=traits(),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            PrefixTuning(num_virtual_tokens=3),
            PrefixTuning(num_virtual_tokens=1, init="text", token_ids=(5, 3)),
            PrefixTuning(num_virtual_tokens=2, projection=True, encoder_hidden=5),
        ),
        storage=Storage(
            expanded_size=lambda cfg, site: cfg.num_virtual_tokens * cfg.width(site), to_stored=_to_pack
        ),
        peft=peft_form(
            "PREFIX_TUNING",
            # no projection: PEFT would pass the stored keys and values, its result, through a fresh one
            lambda cfg: {"prefix_projection": False, "encoder_hidden_size": None, "init_weights": None},
            lambda config: PrefixTuning(**cache_fields(config), baked=True),
            wide=False,
            parts=True,
        ),
    )
)
