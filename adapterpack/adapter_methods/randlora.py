"""RandLoRA: a change of full rank, as a trained sum of frozen random low-rank matrices (Albert et al. 2025,
arXiv 2502.00987, section 4).

    y' = base(x) + s * B (A' x),   A'[k, i] = lambda[k, i] A[k] * gamma[i],   s = alpha / r

for in <= out; otherwise the two factors swap roles. A [r, m], with m the smaller width, and B [M, n, r], with
M the larger one, are drawn from ``projection_prng_key`` as PEFT draws them; n = ceil(m / r). A' is read as [r
n, m] and B as [M, n r], so that, as in PEFT, column i r + k of B does not meet the row of base i and rank k.
All bases are random, so no order is better than another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from . import (
    MATRICES,
    METHODS,
    NO_EXTRAS,
    TRANSPOSED,
    Arrays,
    Dense,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    PeftKeys,
    PositiveInt,
    Projected,
    Projection,
    Random,
    Shape,
    Shapes,
    Site,
    TorchGenerator,
    Traits,
    array_namespace,
    set_defaults,
    zeros,
)


@dataclass(frozen=True)
class RandLoRA(Projected):
    """The hyper-parameters of RandLoRA; ``alpha`` defaults to ``20 r``. ``sparse`` bases hold -1, 0 and 1,
    ``very_sparse`` ones mostly 0.

    Example:
        >>> RandLoRA(r=32).scale
        20.0
    """

    r: PositiveInt = 32
    alpha: FiniteFloat | None = None
    sparse: bool = False
    very_sparse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        set_defaults(self, alpha=20.0 * self.r)

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies the branch."""
        return float(self.alpha or 0.0) / self.r


def _sizes(cfg: RandLoRA, wide: int, tall: int) -> tuple[int, int, int]:
    """Returns the smaller width, the larger width and the number of bases."""
    narrow = min(wide, tall)
    return narrow, max(wide, tall), -(-narrow // cfg.r)


def _pair_shapes(cfg: Any) -> tuple[Shape, ...]:
    narrow, wide, bases = _sizes(cfg, cfg.width, cfg.height)
    return (cfg.r, 1, narrow), (wide, bases, cfg.r)


@lru_cache(maxsize=4)
def _pair(
    seed: int, r: int, narrow: int, wide: int, bases: int, sparsity: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draws both matrices and divides each by its standard deviation: from -1, 0 and 1 with a share ``1 - 1 /
    sparsity`` of zeros, or for a sparsity of 0 Kaiming uniform in bfloat16.
    """
    numbers = TorchGenerator(seed)
    gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))

    def draw(*shape: int) -> np.ndarray:
        if not sparsity:
            bound = math.sqrt(3.0) * (gain / math.sqrt(shape[2]))
            return numbers.uniform(shape, -bound, bound, ml_dtypes.bfloat16)
        drawn = numbers.uniform(shape, 0.0, 1.0)
        part = 1 / (2 * sparsity)
        return (drawn > np.float32(1 - part)).astype(np.float32) - (drawn < np.float32(part))

    A = draw(r, 1, narrow)
    # PEFT draws dense bases one after the other, and sparse ones at once.
    B = draw(wide, bases, r) if sparsity else np.concatenate([draw(wide, 1, r) for _ in range(bases)], axis=1)
    return _normalise(A), _normalise(B)


def _normalise(values: np.ndarray) -> np.ndarray:
    """Returns the values divided by their standard deviation, computed in their own precision."""
    deviation = (
        values.astype(np.float64).std(ddof=1).astype(values.dtype)
        if values.size > 1
        else values.dtype.type(1)
    )
    normed: np.ndarray = (values / (deviation or values.dtype.type(1))).astype(np.float32)
    return normed


def _make(cfg: Any) -> tuple[np.ndarray, ...]:
    narrow, wide, bases = _sizes(cfg, cfg.width, cfg.height)
    sparsity = math.sqrt(narrow) if cfg.very_sparse else 3.0 if cfg.sparse else 0.0
    return _pair(cfg.projection_prng_key, cfg.r, narrow, wide, bases, sparsity)


_PROJECTION = Projection(names=("randlora_A", "randlora_B"), shapes=_pair_shapes, make=_make)


def _shapes(cfg: RandLoRA, site: Site) -> Shapes:
    narrow, _, bases = _sizes(cfg, site.in_features, site.out_features)
    return {"randlora_lambda": (cfg.r, bases), "randlora_gamma": (bases, narrow)}


def _init(cfg: RandLoRA, site: Site, rng: Random) -> Arrays:
    gamma = _shapes(cfg, site)["randlora_gamma"]
    return zeros(_shapes, randlora_gamma=1 / max(gamma))(cfg, site, rng)


def _normal_form(cfg: RandLoRA, params: Params, site: Site) -> NormalForm:
    weights = cfg.scale * params["randlora_lambda"]
    gamma = params["randlora_gamma"]
    xp = array_namespace(weights)
    narrow, wide, bases = _sizes(cfg, site.in_features, site.out_features)
    A = xp.reshape(weights[:, :, None] * params["randlora_A"][:, :, :narrow] * gamma, (cfg.r * bases, narrow))
    B = xp.reshape(params["randlora_B"][:wide, :bases], (wide, bases * cfg.r))
    # The narrow factor carries the trained weights, on whichever side the smaller width is.
    down, up = (A, B) if narrow == site.in_features else (B.T, A.T)
    return NormalForm(down=Dense(down), up=Dense(up))


_KEYS = PeftKeys(
    RandLoRA,
    {
        "r": 32,
        "alpha": 640,
        "projection_prng_key": 0,
        "save_projection": True,
        "sparse": False,
        "very_sparse": False,
        "dropout": 0.0,
    },
    NO_EXTRAS,
    renamed={"alpha": "randlora_alpha", "dropout": "randlora_dropout"},
)

randlora = METHODS.register(
    Method(
        name="randlora",
        summary="a change of full rank: trained weights on frozen random bases; the bases are a seed",
        paper="https://arxiv.org/abs/2502.00987",
        formula="W' = W + s sum_n B_n diag(lambda_n) A_n diag(gamma),  A and B frozen",
        config=RandLoRA,
        traits=Traits(additive=True, frozen=_PROJECTION.names, layers=MATRICES),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            RandLoRA(r=3),
            RandLoRA(r=5, alpha=10, projection_prng_key=7, dropout=0.1),
            RandLoRA(r=2, sparse=True, projection_prng_key=3),
            RandLoRA(r=4, very_sparse=True),
        ),
        storage=_PROJECTION.storage,
        peft=_KEYS.form(
            peft_type="RANDLORA",
            suffixes=("randlora_lambda", "randlora_gamma", *_PROJECTION.names),
            layers=TRANSPOSED,
            shared={"randlora_A": "base_model.randlora_A", "randlora_B": "base_model.randlora_B"},
            from_peft_file=_PROJECTION.from_peft_file,
        ),
    )
)
