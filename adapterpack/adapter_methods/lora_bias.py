"""LoRA whose second factor has a bias (PEFT's ``lora_bias``).

    y' = base(x) + s * (B (A x) + c)

A, B and s are LoRA's; c ``[out]`` starts at zero. A layer without a bias gets one; merging such an adapter is
refused, as in PEFT, because the base's files have no place for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import LINEAR, METHODS, TRANSPOSED, Arrays, NormalForm, Params, Site, as_kernels
from .lora import CONVOLUTION, SPANNING, LoRA, derive_form, lora

_BIAS = "lora_B_bias"


@dataclass(frozen=True)
class LoRABias(LoRA):
    """The hyper-parameters of LoRA.

    Example:
        >>> LoRABias(r=8, alpha=16).scale
        2.0
    """


def _normal_form(cfg: LoRABias, params: Params, site: Site) -> NormalForm:
    form: NormalForm = lora.normal_form(cfg, params, site)
    return form._replace(shift=cfg.scale * params[_BIAS])


def _as_kernels(cfg: LoRABias, site: Site, params: Params) -> Arrays:
    """Returns the factors as convolutions, and the bias unchanged."""
    return {**params, **as_kernels("lora_A", "lora_B")(cfg, site, params)}


lora_bias = METHODS.register(
    lora._replace(
        name="lora_bias",
        summary="a LoRA whose second factor has a bias",
        paper="https://arxiv.org/abs/2106.09685",
        formula="y' = W x + b + s (B A x + c)",
        config=LoRABias,
        traits=replace(lora.traits, low_rank=False, layers=(*LINEAR, "conv", "spanning_conv")),
        shapes=lambda cfg, site: {**lora.shapes(cfg, site), _BIAS: (site.out_features,)},
        init=lambda cfg, site, rng: {
            **lora.init(cfg, site, rng),
            _BIAS: np.zeros(site.out_features, np.float32),
        },
        normal_form=_normal_form,
        examples=(LoRABias(r=3, alpha=5), LoRABias(r=2, use_rslora=True, init="pissa", dropout=0.1)),
        peft=derive_form(
            LoRABias,
            "lora_bias",
            suffixes={_BIAS: "lora_B.bias"},
            write=lambda cfg: True,
            layers={
                **TRANSPOSED,
                "spanning_conv": SPANNING._replace(stored=_as_kernels),
                "conv": CONVOLUTION._replace(stored=_as_kernels),
            },
            overrides={},
            peft_supports=lambda cfg, site: site.bias,
        ),
    )
)
