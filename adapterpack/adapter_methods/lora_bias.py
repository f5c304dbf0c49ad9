"""LoRA whose second factor has a bias (PEFT's ``lora_bias``).

    y' = base(x) + s * (B (A x) + c)

A, B and s are LoRA's; c ``[out]`` starts at zero. A layer without a bias gets one; merging such an adapter is
refused, as in PEFT, because the base's files have no place for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import LINEAR, LORA_ALONE, METHODS, Arrays, NormalForm, Params, PeftForm, Shapes, Site, as_kernels
from .lora import OTHERS, LoRA, derive_config, lora

_BIAS, _KEY = "lora_B_bias", "lora_bias"


@dataclass(frozen=True)
class LoRABias(LoRA):
    """The hyper-parameters of LoRA.

    Example:
        >>> LoRABias(r=8, alpha=16).scale
        2.0
    """


def _shapes(cfg: LoRABias, site: Site) -> Shapes:
    return {**lora.shapes(cfg, site), _BIAS: (site.out_features,)}


def _init(cfg: LoRABias, site: Site, rng: np.random.Generator) -> Arrays:
    return {**lora.init(cfg, site, rng), _BIAS: np.zeros(site.out_features, np.float32)}


def _normal_form(cfg: LoRABias, params: Params, site: Site) -> NormalForm:
    form: NormalForm = lora.normal_form(cfg, params, site)
    return form._replace(shift=cfg.scale * params[_BIAS])


def _as_kernels(cfg: LoRABias, site: Site, params: Params) -> Arrays:
    """Returns the factors as convolutions, and the bias unchanged."""
    return {**params, **as_kernels("lora_A", "lora_B")(cfg, site, params)}


def _form(of_lora: PeftForm) -> PeftForm:
    def to_config(sites: Mapping[str, Any]) -> dict[str, Any] | None:
        written = of_lora.to_config(sites)
        return None if written is None else {**written, _KEY: True}

    def matches(config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == of_lora.peft_type and [
            key for key in OTHERS if config.get(key)
        ] == [_KEY]

    return of_lora._replace(
        refused_by=LORA_ALONE,
        suffixes={**of_lora.suffixes, _BIAS: "lora_B.bias"},
        to_config=to_config,
        from_config=lambda config: derive_config(LoRABias, of_lora.from_config(config)),
        matches=matches,
        layers={
            kind: form if kind not in {"spanning_conv", "conv"} else form._replace(stored=_as_kernels)
            for kind, form in of_lora.layers.items()
            if kind != "embedding"
        },
        overrides={},
        peft_supports=lambda cfg, site: site.bias,
    )


assert lora.peft is not None  # for the type checker
lora_bias = METHODS.register(
    lora._replace(
        name="lora_bias",
        summary="a LoRA whose second factor has a bias",
        paper="https://arxiv.org/abs/2106.09685",
        formula="y' = W x + b + s (B A x + c)",
        config=LoRABias,
        traits=replace(lora.traits, low_rank=False, layers=(*LINEAR, "conv", "spanning_conv")),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(LoRABias(r=3, alpha=5), LoRABias(r=2, use_rslora=True, init="pissa", dropout=0.1)),
        peft=_form(lora.peft),
    )
)
