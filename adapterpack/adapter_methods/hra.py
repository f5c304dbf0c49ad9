"""HRA: reflects the inputs of a layer by a product of Householder reflections (Yuan et al. 2024, arXiv
2405.17484, section 3).

    y' = W (H_1 ... H_r x) + b,   H_i = I - 2 u_i u_i^T / |u_i|^2

``hra_u`` ``[in, r]`` holds the u_i. Each pair of reflections is one step ``I + P Q^T`` of rank 2, written so
that it is exactly the identity if the two vectors are equal. All steps together are one change of rank r: I +
P (I - N)^-1 Q^T, where N is the part of Q^T P above its block diagonal (the compact WY form; Schreiber and
Van Loan 1989, section 2). A fresh adapter has pairs of equal vectors and changes nothing. That is impossible
for an odd number of reflections, and for any number with ``apply_gs``, which makes the vectors orthogonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import (
    METHODS,
    Array,
    Arrays,
    IdentityPlusLowRank,
    Method,
    NoBranch,
    NormalForm,
    Params,
    PeftKeys,
    PeftLayer,
    PositiveInt,
    Random,
    Site,
    Storage,
    Traits,
    array_namespace,
    kaiming,
)
from .core.orthogonal import linear


@dataclass(frozen=True)
class HRA(NoBranch):
    """The hyper-parameters of HRA: ``r`` reflections, orthogonal to each other where ``apply_gs`` is set.

    Example:
        >>> HRA(r=4).apply_gs
        False
    """

    r: PositiveInt = 8
    apply_gs: bool = False


def _init(cfg: HRA, site: Site, rng: Random) -> Arrays:
    vectors = kaiming(rng, (site.in_features, cfg.r))
    if not cfg.apply_gs:
        vectors[:, 1::2] = vectors[:, : 2 * (cfg.r // 2) : 2]
    return {"hra_u": vectors}


@lru_cache(maxsize=64)
def _later(r: int) -> np.ndarray:
    """Returns a matrix ``[r, r]`` that is 1 where the column's pair comes after the row's pair."""
    pair = np.arange(r) // 2
    return (pair[:, None] < pair[None, :]).astype(np.float32)


def _normal_form(cfg: HRA, params: Params, site: Site) -> NormalForm:
    reflections = params["hra_u"]
    xp = array_namespace(reflections)
    unit = reflections / xp.sqrt(xp.sum(reflections * reflections, axis=0, keepdims=True))
    # orthogonal or not, the vectors span the same space, and I - 2 U (U^T U)^-1 U^T mirrors it
    if cfg.apply_gs:
        return NormalForm(
            pre=IdentityPlusLowRank(linear(xp.linalg.solve, xp.matmul(unit.T, unit), -2 * unit.T), unit)
        )
    up, down = _steps(unit)
    # I - N of the compact WY form: N couples each step only with the later ones.
    mixing = xp.eye(cfg.r, dtype=unit.dtype, device=unit.device) - params["later"] * xp.matmul(down, up)
    return NormalForm(pre=IdentityPlusLowRank(linear(xp.linalg.solve, mixing, down), up))


def _steps(unit: Array) -> tuple[Array, Array]:
    """Returns ``P`` ``[n, r]`` and ``Q^T`` ``[r, n]`` of the steps ``I + P_k Q_k^T``, each a pair of
    reflections; for odd r the last step is a single reflection.

    With unit vectors a, b and d = b - a:  H_a H_b = I + 2 a (d - |d|^2 b)^T - 2 d b^T.
    """
    xp = array_namespace(unit)
    width = unit.shape[0]
    count = unit.shape[1] // 2
    first = unit[:, : 2 * count : 2]
    second = unit[:, 1::2]
    apart = second - first
    turn = apart - xp.sum(apart * apart, axis=0, keepdims=True) * second
    up = xp.reshape(xp.stack([2 * first, -2 * apart], axis=2), (width, 2 * count))
    down = xp.reshape(xp.stack([turn, second], axis=2), (width, 2 * count))
    if unit.shape[1] > 2 * count:
        up = xp.concat([up, -2 * unit[:, -1:]], axis=1)
        down = xp.concat([down, unit[:, -1:]], axis=1)
    return up, down.T


_KEYS = PeftKeys(
    HRA, ("r", "apply_gs"), {"bias": "none", "init_weights": True}, renamed={"apply_gs": "apply_GS"}
)

hra = METHODS.register(
    Method(
        name="hra",
        summary="a product of trained reflections of a layer's inputs, orthogonal and of low rank",
        paper="https://arxiv.org/abs/2405.17484",
        formula="y' = W (H_1 ... H_r x) + b,  H_i = I - 2 u_i u_i^T / |u_i|^2",
        config=HRA,
        traits=Traits(identity_at_init=False, min_features=(1, 2)),
        shapes=lambda cfg, site: {"hra_u": (site.in_features, cfg.r)},
        init=_init,
        normal_form=_normal_form,
        examples=(HRA(r=2), HRA(r=3), HRA(r=6), HRA(r=4, apply_gs=True)),
        storage=Storage(
            constants=lambda cfg, site: {} if cfg.apply_gs else {"later": _later(cfg.r)},
            expanded_size=lambda cfg, site: cfg.r * cfg.r,
        ),
        peft=_KEYS.form(
            peft_type="HRA",
            suffixes=("hra_u",),
            layers={"conv": PeftLayer()},
            # PEFT supports only square kernels
            peft_supports=lambda cfg, site: len(site.kernel) in (0, 2) and len(set(site.kernel)) < 2,
            features=lambda params: (params["hra_u"].shape[0], None),
        ),
    )
)
