"""LoRA that also trains the layer's own bias (PEFT's ``bias="lora_only"``).

    y' = base(x) + s * B (A x) + (b' - b)

A, B and s are LoRA's; b' ``[out]`` is the new bias itself, as in PEFT, and starts as b. A layer without a
bias has only A and B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import LINEAR, METHODS, TRANSPOSED, NormalForm, Params, Site
from .lora import LoRA, derive_form, is_lora, lora


@dataclass(frozen=True)
class BiasedLoRA(LoRA):
    """The hyper-parameters of LoRA.

    Example:
        >>> BiasedLoRA(r=8, alpha=16).scale
        2.0
    """


def _normal_form(cfg: BiasedLoRA, params: Params, site: Site) -> NormalForm:
    form: NormalForm = lora.normal_form(cfg, params, site)
    return form._replace(shift=params["bias"] - site.base_bias) if site.bias else form


biased_lora = METHODS.register(
    lora._replace(
        name="biased_lora",
        summary="a LoRA that trains the layer's own bias, too",
        paper="https://arxiv.org/abs/2106.09685",
        formula="y' = W x + b' + s B A x",
        config=BiasedLoRA,
        traits=replace(lora.traits, additive=False, low_rank=False, reads_weight=True, layers=LINEAR),
        shapes=lambda cfg, site: {
            **lora.shapes(cfg, site),
            **({"bias": (site.out_features,)} if site.bias else {}),
        },
        init=lambda cfg, site, rng: {
            **lora.init(cfg, site, rng),
            **({"bias": np.array(site.base_bias)} if site.bias else {}),
        },
        normal_form=_normal_form,
        examples=(BiasedLoRA(r=3, alpha=5), BiasedLoRA(r=2, use_rslora=True, init="olora", dropout=0.1)),
        peft=derive_form(
            BiasedLoRA,
            "bias",
            suffixes={"bias": "base_layer.bias"},
            write=lambda cfg: "lora_only",
            matches=lambda config: is_lora(config) and config.get("bias") in ("lora_only", "all"),
            layers=TRANSPOSED,
        ),
    )
)
