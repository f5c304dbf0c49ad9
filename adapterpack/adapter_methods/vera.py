"""VeRA: one frozen random pair for all layers, and two trained vectors for each (Kopiczko et al. 2023, arXiv
2310.11454, section 3.1).

    y' = base(x) + b * (B (d * (A x)))

A has shape [r, in], B has shape [out, r], d has r numbers that start at ``d_initial``, b has ``out`` numbers
that start at zero. A and B are drawn by Kaiming's uniform rule from ``projection_prng_key``, with the numbers
that PEFT draws on a base in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from . import (
    MATRICES,
    METHODS,
    NO_EXTRAS,
    SHARES_A_PART,
    TRANSPOSED,
    Dense,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    PeftKeys,
    PositiveInt,
    Projected,
    Projection,
    Scaled,
    Shapes,
    Site,
    TorchGenerator,
    Traits,
    widths_of,
    zeros,
)


@dataclass(frozen=True)
class VeRA(Projected):
    """The hyper-parameters of VeRA.

    Example:
        >>> VeRA(r=64, targets=("q_proj", "v_proj")).rank
        64
    """

    r: PositiveInt = 256
    d_initial: FiniteFloat = 0.1

    @property
    def rank(self) -> int:
        """The inner dimension of ``B A``."""
        return self.r


@lru_cache(maxsize=4)
def _pair(seed: int, r: int, rank: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws A ``[r, width]`` and B ``[height, rank]`` in float32, as ``torch.nn.init.kaiming_uniform_`` with
    one generator.
    """
    numbers = TorchGenerator(seed)

    def kaiming(rows: int, columns: int) -> np.ndarray:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return numbers.uniform((rows, columns), -bound, bound)

    return kaiming(r, width), kaiming(height, rank)


def project(A: str, B: str, rows: Callable[[Any], int]) -> Projection:
    """Returns the shared pair with these names, whose A has as many rows as ``rows`` says for a config."""
    return Projection(
        names=(A, B),
        shapes=lambda cfg: ((rows(cfg), cfg.width), (cfg.height, cfg.r)),
        make=lambda cfg: _pair(cfg.projection_prng_key, rows(cfg), cfg.r, cfg.width, cfg.height),
    )


_PROJECTION = project("vera_A", "vera_B", lambda cfg: cfg.r)


def _shapes(cfg: VeRA, site: Site) -> Shapes:
    return {"vera_lambda_b": (site.out_features,), "vera_lambda_d": (cfg.r,)}


def _normal_form(cfg: VeRA, params: Params, site: Site) -> NormalForm:
    A = params["vera_A"][:, : site.in_features]
    B = params["vera_B"][: site.out_features]
    return NormalForm(down=Dense(A), up=Scaled(B, params["vera_lambda_b"], params["vera_lambda_d"]))


_KEYS = PeftKeys(
    VeRA,
    {"r": 256, "projection_prng_key": 0, "save_projection": True, "dropout": 0.0, "d_initial": 0.1},
    NO_EXTRAS,
    renamed={"dropout": "vera_dropout"},
)

vera = METHODS.register(
    Method(
        name="vera",
        summary="two trained vectors around a frozen random pair that all layers share; the pair is a seed",
        paper="https://arxiv.org/abs/2310.11454",
        formula="y' = W x + b + b' * (B (d * (A x))),  A and B frozen and shared",
        config=VeRA,
        traits=Traits(additive=True, low_rank=True, frozen=_PROJECTION.names, layers=MATRICES),
        shapes=_shapes,
        init=lambda cfg, site, rng: zeros(_shapes, vera_lambda_d=cfg.d_initial)(cfg, site, rng),
        normal_form=_normal_form,
        examples=(VeRA(r=3), VeRA(r=5, projection_prng_key=7, d_initial=0.5, dropout=0.1)),
        storage=_PROJECTION.storage,
        peft=_KEYS.form(
            peft_type="VERA",
            suffixes=("vera_lambda_b", "vera_lambda_d"),
            layers=TRANSPOSED,
            features=widths_of(None, "vera_lambda_b"),
            shared={"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"},
            from_peft_file=_PROJECTION.from_peft_file,
            refused_by=SHARES_A_PART,
        ),
    )
)
