"""Polytropon: an inventory of low-rank skills that every task mixes with its own weights (Ponti et al. 2022,
arXiv 2202.13914, section 3).

    y' = base(x) + B_t A_t x / r,   A_t = sum_s w_ts A_s,   B_t = sum_s w_ts B_s
    w_t = sigmoid(Z_t) / sum_s sigmoid(Z_ts)

With ``n_splits`` above 1, inputs and outputs are divided into that many parts, each of which mixes the skills
with its own weights (Multi-Head Routing, Caccia et al. 2022, arXiv 2211.03831). If ``n_splits`` does not
divide a layer's widths, its largest divisor that does replaces it; PEFT refuses such layers. Z starts near
zero, A as in LoRA and B at zero.

A pack holds the skills and the weights of all tasks, and performs one of them, ``default_task``: packs of
several tasks are several adapters, and may serve different rows of one batch. PEFT takes the tasks with every
call and draws the weights at random during training; here ``default_task`` is trained, with the weights
themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import Unsupported, excerpt
from . import (
    LINEAR,
    LORA_ALONE,
    METHODS,
    Array,
    Arrays,
    Dense,
    Method,
    NonNegativeInt,
    NormalForm,
    Params,
    PeftConfig,
    PeftKeys,
    PositiveInt,
    Random,
    RankConfig,
    Shapes,
    Site,
    Storage,
    Traits,
    array_namespace,
    kaiming,
)


@dataclass(frozen=True)
class Poly(RankConfig):
    """The hyper-parameters of Poly, under PEFT's names; ``default_task``, counted from 0, is the task that
    the adapter does.

    Example:
        >>> Poly(r=4, n_tasks=3, default_task=2).scale
        0.25
    """

    n_tasks: PositiveInt = 1
    n_skills: PositiveInt = 4
    n_splits: PositiveInt = 1
    default_task: NonNegativeInt = 0

    task_field: ClassVar[str] = "default_task"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.default_task >= self.n_tasks:
            raise ValueError(f"task {self.default_task} is none of {self.n_tasks}, which are counted from 0")

    @property
    def scale(self) -> float:
        """The number that multiplies ``B_t A_t``."""
        return 1 / self.r


def _shapes(cfg: Poly, site: Site) -> Shapes:
    splits = math.gcd(cfg.n_splits, site.in_features, site.out_features)
    return {
        "poly_lora_A": (splits, cfg.n_skills, site.in_features // splits, cfg.r),
        "poly_lora_B": (splits, cfg.n_skills, cfg.r, site.out_features // splits),
        "poly_router": (cfg.n_tasks, splits * cfg.n_skills),
    }


def _init(cfg: Poly, site: Site, rng: Random) -> Arrays:
    shapes = _shapes(cfg, site)
    splits, skills, narrow, r = shapes["poly_lora_A"]
    A = kaiming(rng, (splits * skills * r, narrow)).reshape(splits, skills, r, narrow).swapaxes(2, 3)
    router = rng.uniform(-1e-3, 1e-3, shapes["poly_router"]).astype(np.float32)
    return {
        "poly_lora_A": np.ascontiguousarray(A),
        "poly_lora_B": np.zeros(shapes["poly_lora_B"], np.float32),
        "poly_router": router,
    }


def _weights(cfg: Poly, params: Params) -> Array:
    """Returns the weights of the skills in the task, ``[splits, skills, 1, 1]``."""
    xp = array_namespace(params["poly_router"])
    shares = 1 / (
        1 + xp.exp(-xp.reshape(params["poly_router"][cfg.default_task, :], params["poly_lora_A"].shape[:2]))
    )
    return (shares / (xp.sum(shares, axis=-1, keepdims=True) + 1e-12))[:, :, None, None]


def _normal_form(cfg: Poly, params: Params, site: Site) -> NormalForm:
    weights = _weights(cfg, params)
    xp = array_namespace(weights)
    # Mixing the skills first leaves one ordinary pair of factors for the task.
    A, B = (xp.sum(weights * params[f"poly_lora_{side}"], axis=1) for side in "AB")
    down = xp.reshape(xp.permute_dims(A, (2, 0, 1)), (cfg.r, -1))
    up = xp.reshape(xp.permute_dims(B, (0, 2, 1)), (-1, cfg.r))
    return NormalForm(down=Dense(down), up=Dense(cfg.scale * up))


_KEYS = PeftKeys(Poly, ("r", "n_tasks", "n_skills", "n_splits"), {"poly_type": "poly", "init_weights": True})


def _from_peft(config: PeftConfig) -> Any:
    if (router := config.get("poly_type", "poly")) != "poly":
        raise Unsupported(
            "this PEFT option is not supported: poly_type",
            found=excerpt(router),
            expected="poly",
            remedy="keep the adapter with the library that made it",
        )
    return _KEYS.from_config(config)


poly = METHODS.register(
    Method(
        name="poly",
        summary="low-rank skills that every task mixes in its own way",
        paper="https://arxiv.org/abs/2202.13914",
        formula="y' = W x + b + (sum_s w_ts B_s) (sum_s w_ts A_s) x / r",
        config=Poly,
        traits=Traits(additive=True, low_rank=True, layers=LINEAR),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(Poly(r=3, n_tasks=2), Poly(r=2, n_tasks=3, n_skills=2, n_splits=3)),
        storage=Storage(
            expanded_size=lambda cfg, site: cfg.n_skills * cfg.r * (site.in_features + site.out_features)
        ),
        peft=_KEYS.form(
            peft_type="POLY",
            suffixes={
                "poly_lora_A": "poly_lora_A",
                "poly_lora_B": "poly_lora_B",
                "poly_router": "poly_router.module_logits",
            },
            from_config=_from_peft,
            features=lambda params: (
                params["poly_lora_A"].shape[0] * params["poly_lora_A"].shape[2],
                params["poly_lora_B"].shape[0] * params["poly_lora_B"].shape[3],
            ),
            peft_supports=lambda cfg, site: False,  # PEFT needs a task in every call, and cannot merge
            refused_by={**LORA_ALONE, "transformers": "it gives no task, which every call needs"},
        ),
    )
)
