"""KaSA: removes the smallest singular values of the weight and adds a trained low-rank change with singular
values (Wang et al. 2024, arXiv 2412.06071, section 4).

    W' = W - U_r S_r V_r^T + s B diag(d) A

U_r, S_r, V_r belong to the r smallest singular values of W (to all but one, if r is not smaller than their
number). PEFT writes the cut into the base; here it is a part of the change, recomputed from W, so that a
model without the adapter is always the base. A fresh adapter consists of that cut. A is ``[r, in]``, B
``[out, r]``, d ``[r]``.

A penalty in the loss keeps d small and A and B close to orthogonal (equations 9 to 11): beta ||d||^2 + gamma
(||B^T B - I||_F + ||A A^T - I||_F).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import (
    METHODS,
    Array,
    Arrays,
    Dense,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    Site,
    Storage,
    Training,
    Traits,
    array_namespace,
)
from .lora import PLAIN_FILES, LoRA, derive_form, lora
from .peft.base_change import require_kept_base


@dataclass(frozen=True)
class KaSA(LoRA):
    """The hyper-parameters of LoRA, and the weights of the penalty.

    Example:
        >>> KaSA(r=8, alpha=16).scale
        2.0
    """

    beta: FiniteFloat = 1e-4
    gamma: FiniteFloat = 1e-3


def _cut(cfg: KaSA, site: Site) -> Arrays:
    """Returns the part of W that is removed, as factors: ``cut_up`` ``[out, k]`` and ``cut_down`` ``[k,
    in]``.
    """
    u, values, vt = np.linalg.svd(np.asarray(site.weight), full_matrices=False)
    kept = max(1, len(values) - cfg.r)
    return {"cut_up": -u[:, kept:] * values[kept:], "cut_down": vt[kept:]}


def _normal_form(cfg: KaSA, params: Params, site: Site) -> NormalForm:
    A = params["lora_A"]
    B = cfg.scale * params["lora_B"] * params["lora_diag"]
    xp = array_namespace(A, B)
    return NormalForm(
        down=Dense(xp.concat([A, params["cut_down"]], axis=0)),
        up=Dense(xp.concat([B, params["cut_up"]], axis=1)),
    )


def _penalty(cfg: KaSA, params: Params, sites: int) -> Array:
    A = params["lora_A"]
    B = params["lora_B"]
    d = params["lora_diag"]
    xp = array_namespace(A, B, d)
    return cfg.beta * xp.sum(d * d) + cfg.gamma * (
        departure(xp.matmul(B.T, B)) + departure(xp.matmul(A, A.T))
    )


def departure(gram: Array) -> Array:
    """Returns ``||G - I||_F`` of a Gram matrix ``[r, r]``."""
    xp = array_namespace(gram)
    difference = gram - xp.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return xp.sqrt(xp.sum(difference * difference))


def _read_penalty(weights: Any) -> dict[str, Any]:
    if not isinstance(weights, Mapping):
        raise ValueError(f"kasa_config must be an object, not {weights!r:.80}")
    return {"beta": weights.get("beta", KaSA.beta), "gamma": weights.get("gamma", KaSA.gamma)}


kasa = METHODS.register(
    Method(
        name="kasa",
        summary="the smallest singular values of the weight give way to a low-rank change with trained ones",
        paper="https://arxiv.org/abs/2412.06071",
        formula="W' = W - U_r S_r V_r^T + s B diag(d) A",
        config=KaSA,
        traits=Traits(additive=True, identity_at_init=False, reads_weight=True),
        shapes=lambda cfg, site: {**lora.shapes(cfg, site), "lora_diag": (cfg.r,)},
        init=lambda cfg, site, rng: {
            **lora.init(cfg, site, rng),
            "lora_diag": rng.standard_normal(cfg.r).astype(np.float32),
        },
        normal_form=_normal_form,
        examples=(KaSA(r=1), KaSA(r=3, alpha=5), KaSA(r=4, alpha=4, use_rslora=True, dropout=0.1, beta=1e-3)),
        training=Training(rates=lora.training.rates),
        overrides={"penalty": _penalty},
        storage=Storage(constants=_cut),
        peft=derive_form(
            KaSA,
            "kasa_config",
            suffixes={"lora_diag": "lora_diag"},
            write=lambda cfg: {"beta": cfg.beta, "gamma": cfg.gamma},
            read=_read_penalty,
            matches=lambda config: (
                config.get("peft_type") == "LORA"
                and bool(config.get("kasa_config"))
                and not config.get("use_dora")
            ),
            layers={},
            undo_base_change=require_kept_base,
            **PLAIN_FILES,
        ),
    )
)
