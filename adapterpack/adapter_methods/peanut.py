"""PEANuT: a small network computes the change of a weight from the weight itself (Zhong et al. 2024, arXiv
2410.01870, section 3).

    W' = W + s B h^T
    h = f(W^T A^T), then f(h E_i^T) for each encoder,
        then f(h D_i^T) + (h before encoder depth - i) for each decoder

A is [r, out], B is [out, r], the ``depth`` encoders E and decoders D are [r, r]. h ``[in, r]`` is a function
of the frozen weight, so the change has rank r. The adapter is the network: applied to another weight, it
gives another change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from . import (
    METHODS,
    WEIGHTS,
    Arrays,
    Dense,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    PeftConfig,
    PeftKeys,
    PositiveInt,
    Random,
    RankConfig,
    Shapes,
    Site,
    SiteConfigs,
    Storage,
    Traits,
    kaiming,
    widths_of,
)
from .core.config import require_choice
from .forms.blocks import ACTIVATIONS, ALIASES

_DEEPEST = 16
"""The most encoders and decoders; the paper uses up to three."""
_THEIRS = {"identity": "linear", "gelu_tanh": "gelu_new"}
"""This package's names of activations -> the names in transformers."""


@dataclass(frozen=True)
class PEANuT(RankConfig):
    """The hyper-parameters of PEANuT; ``act_fn`` is f.

    Example:
        >>> PEANuT(r=32, depth=1, act_fn="swish").act_fn
        'silu'
    """

    r: PositiveInt = 32
    depth: Annotated[int, Meta(ge=0, le=_DEEPEST)] = 0
    act_fn: str = "relu"
    scaling: FiniteFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        act = ALIASES.get(self.act_fn, self.act_fn)
        require_choice("act_fn", act, tuple(ACTIVATIONS))
        object.__setattr__(self, "act_fn", act)

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies the change."""
        return self.scaling


def _shapes(cfg: PEANuT, site: Site) -> Shapes:
    inner = {
        f"peanut_{part}_{i}": (cfg.r, cfg.r) for part in ("encoder", "decoder") for i in range(cfg.depth)
    }
    return {"peanut_A": (cfg.r, site.out_features), "peanut_B": (site.out_features, cfg.r), **inner}


def _init(cfg: PEANuT, site: Site, rng: Random) -> Arrays:
    made = {name: kaiming(rng, shape) for name, shape in _shapes(cfg, site).items()}
    return {**made, "peanut_B": np.zeros_like(made["peanut_B"])}


def _normal_form(cfg: PEANuT, params: Params, site: Site) -> NormalForm:
    act = ACTIVATIONS[cfg.act_fn]
    weight = site.weight
    passed = []
    assert weight is not None  # for the type checker
    h = act(weight.T @ params["peanut_A"].T)
    for i in range(cfg.depth):
        passed.append(h)
        h = act(h @ params[f"peanut_encoder_{i}"].T)
    for i in range(cfg.depth):
        h = act(h @ params[f"peanut_decoder_{i}"].T) + passed.pop()
    return NormalForm(down=Dense(h.T), up=Dense(params["peanut_B"], cfg.scale))


_KEYS = PeftKeys(PEANuT, ("r", "depth", "act_fn", "scaling"), {"init_weights": True})


def _to_peft(sites: SiteConfigs) -> PeftConfig:
    written = _KEYS.to_config(sites)
    return {**written, "act_fn": _THEIRS.get(written["act_fn"], written["act_fn"])}


peanut = METHODS.register(
    Method(
        name="peanut",
        summary="a small network makes the change of a weight out of the weight",
        paper="https://arxiv.org/abs/2410.01870",
        formula="W' = W + s B f(... f(W^T A^T))^T,  f an activation",
        config=PEANuT,
        traits=Traits(reads_weight=True, layers=WEIGHTS),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(PEANuT(r=3, act_fn="tanh"), PEANuT(r=4, depth=2, act_fn="silu", scaling=2)),
        storage=Storage(
            expanded_size=lambda cfg, site: (2 * cfg.depth + 2) * cfg.r * (site.in_features + cfg.r)
        ),
        peft=_KEYS.form(
            peft_type="PEANUT",
            suffixes={
                "peanut_A": "peanut_A.weight",
                "peanut_B": "peanut_B.weight",
                **{
                    f"peanut_{part}_{i}": f"peanut_{part}s.{i}.weight"
                    for part in ("encoder", "decoder")
                    for i in range(_DEEPEST)
                },
            },
            to_config=_to_peft,
            features=widths_of(None, "peanut_B"),
        ),
    )
)
