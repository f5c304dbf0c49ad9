"""Super-Tuning: trained changes of the largest (or smallest) weights (arXiv 2607.09287); with a rank, plus a
LoRA ("Supra").

    W' = W + S + s B A,   s = alpha / r
    S [out, in] is zero except at the (1 - sparsity) out in largest |W|

The positions are chosen once, when the adapter is created, and stored with the values as row-major int32
indices. Choosing them again could give others wherever two weights have the same magnitude, which is common
in 16 bits. Dropout acts on the entire change; in PEFT it acts on ``B A`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from ..errors import Unsupported
from . import (
    LINEAR,
    METHODS,
    Arrays,
    Dense,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    PeftContent,
    PeftKeys,
    PositiveInt,
    Random,
    Shapes,
    Site,
    SiteConfig,
    Sparse,
    Storage,
    Training,
    Traits,
    array_namespace,
    kaiming,
    require_places,
    require_widths,
    set_defaults,
    zeros,
)


@dataclass(frozen=True)
class SuperTuning(SiteConfig):
    """The hyper-parameters of Super-Tuning; with ``r`` it is Supra, whose ``alpha`` defaults to ``2 r``.

    Example:
        >>> SuperTuning(sparsity=0.99).alpha, SuperTuning(r=8).scale
        (None, 2.0)
    """

    sparsity: Annotated[float, Meta(ge=0, lt=1)] = 0.99
    select_top: bool = True
    r: PositiveInt | None = None
    alpha: FiniteFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            set_defaults(self, alpha=2.0 * self.r)
        elif self.alpha is not None or self.dropout:
            raise ValueError("alpha and dropout belong to the low-rank part, which there is with r only")

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies ``B A``; 1 without one."""
        return 1.0 if self.r is None else float(self.alpha or 0.0) / self.r

    @property
    def redundant(self) -> bool:
        """True: the positions are stored, because the weight alone does not determine them."""
        return True


def _count(cfg: SuperTuning, site: Site) -> int:
    """Returns how many weights are changed, as PEFT counts them, but at least one."""
    return max(1, int(site.out_features * site.in_features * (1 - cfg.sparsity)))


def _shapes(cfg: SuperTuning, site: Site) -> Shapes:
    count = (_count(cfg, site),)
    sparse = {"supertuning_values": count, "supertuning_indices": count}
    if cfg.r is None:
        return sparse
    factors = {
        "supertuning_lora_A": (cfg.r, site.in_features),
        "supertuning_lora_B": (site.out_features, cfg.r),
    }
    return {**sparse, **factors}


def _init(cfg: SuperTuning, site: Site, rng: Random) -> Arrays:
    sizes = np.abs(np.asarray(site.weight)).reshape(-1)
    order = np.argsort(-sizes if cfg.select_top else sizes, kind="stable")
    made = zeros(_shapes, supertuning_lora_A=kaiming)(cfg, site, rng)
    return {**made, "supertuning_indices": order[: _count(cfg, site)].astype(np.int32)}


def _normal_form(cfg: SuperTuning, params: Params, site: Site) -> NormalForm:
    require_widths(site)
    flat = params["supertuning_indices"]
    xp = array_namespace(flat)
    at = xp.stack([flat // site.in_features, flat % site.in_features])
    sparse = Sparse(params["supertuning_values"], at, (site.out_features, site.in_features))
    if cfg.r is None:
        return NormalForm(down=sparse)
    return NormalForm(
        down=Dense(
            sparse.dense() + xp.matmul(cfg.scale * params["supertuning_lora_B"], params["supertuning_lora_A"])
        )
    )


def _require(cfg: SuperTuning, params: Params, site: Site) -> None:
    require_places(np.asarray(params["supertuning_indices"])[None], (site.out_features * site.in_features,))


_KEYS = PeftKeys(
    SuperTuning,
    ("sparsity", "select_top", "r", "alpha", "dropout"),
    {"init_weights": True, "save_precomputed_indices": True},
    renamed={"alpha": "lora_alpha", "dropout": "lora_dropout"},
)


def _from_peft_file(content: PeftContent) -> PeftContent:
    if any("supertuning_indices" not in params for params in content.sites.values()):
        raise Unsupported(
            "this file does not say which weights it changes: of two that are as large the library chose one",
            where="supertuning_indices",
            expected="the places of the values",
            remedy="save it again with PEFT after setting save_precomputed_indices=True in its config",
        )
    return content


supertuning = METHODS.register(
    Method(
        name="supertuning",
        summary="trained changes of the largest or smallest weights, and with a rank LoRA as well",
        paper="https://arxiv.org/abs/2607.09287",
        formula="W' = W + S + s B A,  S sparse, at the largest |W|;  s = alpha / r",
        config=SuperTuning,
        traits=Traits(additive=True, layers=LINEAR),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            SuperTuning(sparsity=0.8),
            SuperTuning(sparsity=0.9, select_top=False, r=3, alpha=5, dropout=0.1),
        ),
        storage=Storage(
            require=_require, expanded_size=lambda cfg, site: site.out_features * site.in_features
        ),
        training=Training(needs=lambda cfg: frozenset({"weight"})),
        peft=_KEYS.form(
            peft_type="SUPERTUNING",
            suffixes={
                "supertuning_values": "supertuning_values",
                "supertuning_indices": "supertuning_indices",
                "supertuning_lora_A": "supertuning_lora_A.weight",
                "supertuning_lora_B": "supertuning_lora_B.weight",
            },
            from_config=lambda config: _KEYS.from_config(
                config if config.get("r") is not None else {**config, "lora_dropout": 0.0}
            ),
            features=lambda params: (
                (params["supertuning_lora_A"].shape[1], params["supertuning_lora_B"].shape[0])
                if "supertuning_lora_A" in params
                else (None, None)
            ),
            from_peft_file=_from_peft_file,
            peft_supports=lambda cfg, site: (
                int(site.out_features * site.in_features * (1 - cfg.sparsity)) > 0
            ),
        ),
    )
)
