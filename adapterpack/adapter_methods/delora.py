"""DeLoRA: a low-rank change whose size is bounded separately from its direction (Bini et al. 2025, arXiv
2503.18225, section 3).

    W' = W + B diag(lambda / (r ||A_i|| ||B_i||)) A diag(||W||_column)

A is ``[r, in]``, B ``[out, r]``, lambda one trained number. The column norms ``[in]`` are those of the base
weight when the adapter was created. They are stored, as in PEFT, so that the adapter can be used without the
base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import (
    MATRICES,
    METHODS,
    Array,
    Arrays,
    Dense,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    PeftKeys,
    PositiveInt,
    Random,
    RanksConfig,
    Shapes,
    Site,
    Training,
    Traits,
    array_namespace,
    kaiming,
    pattern_of,
    widths_of,
    zeros,
)

_LEAST = 1e-4
"""Norms of A's rows and B's columns are at least this, as in PEFT."""


@dataclass(frozen=True)
class DeLoRA(RanksConfig):
    """The hyper-parameters of DeLoRA: ``bound`` is where lambda begins (PEFT's ``delora_lambda``), and may
    differ by site.

    Example:
        >>> DeLoRA(r=16, bound_pattern={"v_proj": 5}).at("layers.0.v_proj").bound
        5.0
    """

    r: PositiveInt = 16
    bound: FiniteFloat = 15.0
    bound_pattern: Mapping[str, float] = pattern_of("bound")


def _shapes(cfg: DeLoRA, site: Site) -> Shapes:
    return {
        "delora_A": (cfg.r, site.in_features),
        "delora_B": (site.out_features, cfg.r),
        "delora_lambda": (1,),
        "delora_w_norm": (site.in_features,),
    }


def _init(cfg: DeLoRA, site: Site, rng: Random) -> Arrays:
    made = zeros(_shapes, delora_A=kaiming, delora_lambda=cfg.bound)(cfg, site, rng)
    lengths = np.linalg.norm(np.asarray(site.weight), axis=0)
    return {**made, "delora_w_norm": lengths.astype(np.float32)}


def _normal_form(cfg: DeLoRA, params: Params, site: Site) -> NormalForm:
    A, B = params["delora_A"], params["delora_B"]
    # Normalising each rank-one term bounds the size of the change by lambda, independently of A and B.
    share = params["delora_lambda"] / cfg.r / (_length(A, 1) * _length(B, 0))
    return NormalForm(down=Dense(A * params["delora_w_norm"]), up=Dense(B * share))


def _length(matrix: Array, axis: int) -> Array:
    """Returns the norms of rows or columns, at least 1e-4. The clip also removes the gradient there, where
    the root has none.
    """
    xp = array_namespace(matrix)
    return xp.sqrt(xp.clip(xp.sum(matrix * matrix, axis=axis), _LEAST**2, None))


_KEYS = PeftKeys(
    DeLoRA,
    {"r": 8, "bound": 15, "dropout": 0.0},
    {"init_weights": True, "bias": "none"},
    renamed={"bound": "delora_lambda", "bound_pattern": "lambda_pattern", "dropout": "module_dropout"},
    whole=("bound",),
)

delora = METHODS.register(
    Method(
        name="delora",
        summary="a low-rank change with a trained bound on its size",
        paper="https://arxiv.org/abs/2503.18225",
        formula="W' = W + B diag(lambda / (r |A_i| |B_i|)) A diag(|W|_column)",
        config=DeLoRA,
        traits=Traits(additive=True, low_rank=True, frozen=("delora_w_norm",), layers=MATRICES),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(DeLoRA(r=2, bound=6), DeLoRA(r=3, bound=3), DeLoRA(r=5, bound=2.5, dropout=0.1)),
        training=Training(needs=lambda cfg: frozenset({"weight"})),
        peft=_KEYS.form(
            peft_type="DELORA",
            suffixes=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
            features=widths_of("delora_A", "delora_B"),
        ),
    )
)
