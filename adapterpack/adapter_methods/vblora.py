"""VB-LoRA: builds LoRA's factors from a bank of vectors that all layers share (Li et al. 2024, arXiv
2405.15179, section 3).

    y' = base(x) + B (A x)
    every piece of b numbers of a row of A or a column of B is  sum_k softmax(top-k logits)_k bank[k]

The bank has shape [h, b]; a site has one logit for every piece and every vector. If b does not divide a
width, the last piece is cut; PEFT refuses such a layer. A fresh adapter changes the output, as in PEFT and
the paper, because no part of it could be trained from zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import Unsupported
from . import (
    METHODS,
    SHARES_A_PART,
    TRANSPOSED,
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
    RankConfig,
    Shapes,
    Shared,
    Site,
    Storage,
    Traits,
    array_namespace,
    require_widths,
)


@dataclass(frozen=True)
class VBLoRA(RankConfig):
    """The hyper-parameters of VB-LoRA.

    With ``save_only_topk_weights`` a file holds only the weights of the best ``topk`` vectors instead of all
    logits: it is small, but cannot be trained further.

    Example:
        >>> VBLoRA(r=4, num_vectors=256, vector_length=64).rank
        4
    """

    r: PositiveInt = 4
    num_vectors: PositiveInt = 256
    vector_length: PositiveInt = 256
    topk: PositiveInt = 2
    init_vector_bank_bound: FiniteFloat = 0.02
    init_logits_std: FiniteFloat = 0.1
    save_only_topk_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ValueError(f"topk must be at most num_vectors, {self.num_vectors}, not {self.topk}")


_SIDES = ("vblora_logits_A", "vblora_logits_B")


def _pieces(cfg: VBLoRA, site: Site) -> tuple[int, int]:
    """Returns how many vectors make up a row of A and a column of B."""
    return -(-site.in_features // cfg.vector_length), -(-site.out_features // cfg.vector_length)


def _shapes(cfg: VBLoRA, site: Site) -> Shapes:
    wide, tall = _pieces(cfg, site)
    pieces = dict(zip(_SIDES, ((cfg.r, wide), (tall, cfg.r)), strict=True))
    if not cfg.save_only_topk_weights:
        return {name: (*piece, cfg.num_vectors) for name, piece in pieces.items()}
    return {
        f"{name}_topk_{leaf}": (*piece, count)
        for name, piece in pieces.items()
        for leaf, count in (("indices", cfg.topk), ("weights", cfg.topk - 1))
    }


def _init(cfg: VBLoRA, site: Site, rng: Random) -> Arrays:
    if cfg.save_only_topk_weights:
        raise Unsupported(
            "weights of the best vectors alone cannot be trained",
            where="save_only_topk_weights",
            remedy="set it to false",
        )
    return {
        name: (cfg.init_logits_std * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in _shapes(cfg, site).items()
    }


def _bank(cfg: VBLoRA, sites: Sequence[Site], rng: Random) -> Arrays:
    bound = cfg.init_vector_bank_bound
    return {
        "vblora_vector_bank": rng.uniform(-bound, bound, (cfg.num_vectors, cfg.vector_length)).astype(
            np.float32
        )
    }


def _best(xp: Any, logits: Array, count: int) -> tuple[Array, Array]:
    """Returns the indices of the ``count`` largest logits along the last axis, and their softmax."""
    if hasattr(xp, "topk"):  # torch's one call; the standard has no such function yet
        top, best = xp.topk(logits, count, dim=-1)
    else:
        best = xp.flip(xp.argsort(logits, axis=-1), axis=-1)[..., :count]
        top = xp.take_along_axis(logits, best, axis=-1)
    powers = xp.exp(top - top[..., :1])
    return best, powers / xp.sum(powers, axis=-1, keepdims=True)


def _rows(xp: Any, params: Params, leaf: str = "") -> Array:
    """Returns the pieces of both factors, one after the other, as rows."""
    # Both factors go through one top-k and one gather, which is faster than two of each.
    both = [params[f"{side}{leaf}"] for side in _SIDES]
    return xp.concat([xp.reshape(part, (-1, part.shape[2])) for part in both], axis=0)


def _normal_form(cfg: VBLoRA, params: Params, site: Site) -> NormalForm:
    require_widths(site)
    bank = params["vblora_vector_bank"]
    wide = -(-site.in_features // cfg.vector_length)
    xp = array_namespace(bank)
    if cfg.save_only_topk_weights:
        best = xp.astype(_rows(xp, params, "_topk_indices"), xp.int64)
        stored_weights = _rows(xp, params, "_topk_weights")
        weights = xp.concat([stored_weights, 1 - xp.sum(stored_weights, axis=-1, keepdims=True)], axis=-1)
    else:
        best, weights = _best(xp, _rows(xp, params), cfg.topk)
    vectors = xp.reshape(xp.take(bank, xp.reshape(best, (-1,)), axis=0), (*best.shape, cfg.vector_length))
    pieces = xp.sum(weights[..., None] * vectors, axis=-2)
    A = pieces[: cfg.r * wide]
    B = xp.reshape(pieces[cfg.r * wide :], (-1, cfg.r, cfg.vector_length))
    down = xp.reshape(A, (cfg.r, -1))[:, : site.in_features]
    up = xp.reshape(xp.permute_dims(B, (0, 2, 1)), (-1, cfg.r))[: site.out_features]
    return NormalForm(down=Dense(down), up=Dense(up))


_KEYS = PeftKeys(
    VBLoRA,
    (
        "r",
        "num_vectors",
        "vector_length",
        "topk",
        "init_vector_bank_bound",
        "init_logits_std",
        "save_only_topk_weights",
        "dropout",
    ),
    {"fan_in_fan_out": False, "bias": "none"},
    renamed={"dropout": "vblora_dropout"},
)

vblora = METHODS.register(
    Method(
        name="vblora",
        summary="LoRA's factors mixed from a bank of vectors that all layers share",
        paper="https://arxiv.org/abs/2405.15179",
        formula="y' = W x + b + B A x,  A and B mixed from one bank of vectors",
        config=VBLoRA,
        traits=Traits(additive=True, identity_at_init=False, low_rank=True),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            VBLoRA(r=2, num_vectors=5, vector_length=3, init_vector_bank_bound=0.5),
            VBLoRA(r=3, num_vectors=7, vector_length=1, topk=3, init_vector_bank_bound=1.0, dropout=0.1),
        ),
        storage=Storage(
            expanded_size=lambda cfg, site: cfg.topk * cfg.r * cfg.vector_length * sum(_pieces(cfg, site)),
            shared=Shared(
                lambda cfg, sites: {"vblora_vector_bank": (cfg.num_vectors, cfg.vector_length)}, _bank
            ),
        ),
        peft=_KEYS.form(
            peft_type="VBLORA",
            suffixes={
                name: name
                for side in _SIDES
                for name in (f"{side}_topk_indices", f"{side}_topk_weights", side)
            },
            layers=TRANSPOSED,
            peft_supports=lambda cfg, site: (
                site.in_features % cfg.vector_length == 0 == site.out_features % cfg.vector_length
            ),
            shared={"vblora_vector_bank": "base_model.vblora_vector_bank"},
            refused_by=SHARES_A_PART,
        ),
    )
)
