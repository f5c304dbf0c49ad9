"""DoRA: LoRA on the direction of a weight, with a trained norm for each row (Liu et al. 2024, arXiv
2402.09353, section 4).

    y' = c * (W x + s B A x) + b,   c = m / ||W + s B A||_row

A ``[r, in]``, B ``[out, r]``, m ``[out]``. The bias is not scaled. The norm is a constant for the gradient
(section 4.3, as in PEFT): the exact gradient adds little and costs a second pass over the weight. ``B A`` is
never formed, because

    ||W + s B A||^2 = ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import (
    LORA_ALONE,
    METHODS,
    TRANSPOSED,
    WEIGHTS,
    Array,
    Arrays,
    Dense,
    Method,
    NormalForm,
    Params,
    PeftContent,
    PeftLayer,
    Site,
    Storage,
    Training,
    Traits,
    array_namespace,
    as_kernels,
    constant,
    has_axes,
    refuse_site,
)
from .core.base import factors
from .core.peft_form import as_matrices
from .lora import EMBEDDED, PLAIN_FILES, LoRA, derive_form, lora, spans_groups

_LEAST = 1e-12
"""Row norms are at least this, so that a row of zeros does not cause a division by zero."""


@dataclass(frozen=True)
class DoRA(LoRA):
    """The hyper-parameters of DoRA are those of LoRA.

    Example:
        >>> DoRA(r=8, alpha=16).scale
        2.0
    """


def _lengths(site: Site) -> np.ndarray:
    """Returns ``||W||_row`` rounded to float32, so that a fresh magnitude and the norm that divides it are
    the same numbers.
    """
    weight = np.asarray(site.weight)
    lengths: np.ndarray = np.maximum(
        np.sqrt(np.einsum("oi,oi->o", weight, weight, dtype=np.float64)), _LEAST
    ).astype(np.float32)
    return lengths


def _normal_form(cfg: DoRA, params: Params, site: Site) -> NormalForm:
    A = params["lora_A"]
    B = cfg.scale * params["lora_B"]
    ratio = params["lora_magnitude_vector"] / _norm(params["lengths"], site.weight, constant(A), constant(B))
    # `output_scale` also scales the bias; the shift restores it.
    shift = None if site.base_bias is None else (1 - ratio) * site.base_bias
    return NormalForm(down=Dense(A), up=Dense(B), output_scale=ratio, shift=shift)


def _norm(lengths: Array, weight: Array, A: Array, B: Array) -> Array:
    """Returns ``||W + B A||_row``, computed as a multiple of ``||W||_row`` so that it is exactly that if B is
    zero.
    """
    xp = array_namespace(lengths, weight, A, B)
    cross = xp.sum(xp.matmul(weight, A.T) * B, axis=1)
    square = xp.sum(xp.matmul(B, xp.matmul(A, A.T)) * B, axis=1)
    return lengths * xp.sqrt(xp.clip(1 + (2 * cross + square) / lengths**2, _LEAST, None))


_FACTORS = as_kernels("lora_A", "lora_B")


def _as_kernels(cfg: DoRA, site: Site, params: Params) -> Arrays:
    """Returns the factors as for LoRA, and the norms along the axis of the outputs."""
    ones = (1,) * len(site.kernel)
    return {
        **_FACTORS(cfg, site, params),
        "lora_magnitude_vector": params["lora_magnitude_vector"].reshape(1, -1, *ones),
    }


def _from_kernels(cfg: DoRA, params: Params) -> Arrays:
    vector = params["lora_magnitude_vector"].reshape(-1)
    return {**as_matrices(params), "lora_magnitude_vector": vector}


def _require_plain_rows(content: PeftContent) -> PeftContent:
    """Returns the content unchanged.

    Raises:
        Unsupported: a site is a grouped convolution.
    """
    for path, params in content.sites.items():
        if spans_groups({f"{name}.weight": value.shape for name, value in params.items()}):
            raise refuse_site(
                path,
                params,
                "PEFT divides DoRA at a convolution of groups by lengths of rows that it mixes up between "
                "the groups",
            )
    return content


dora = METHODS.register(
    Method(
        name="dora",
        summary="LoRA on the direction of each weight row, with a trained length",
        paper="https://arxiv.org/abs/2402.09353",
        formula="y' = c * (W x + s B A x) + b,  c = m / |W + s B A|_row",
        config=DoRA,
        traits=Traits(reads_weight=True, layers=(*WEIGHTS, "embedding")),
        shapes=lambda cfg, site: {**lora.shapes(cfg, site), "lora_magnitude_vector": (site.out_features,)},
        init=lambda cfg, site, rng: {**lora.init(cfg, site, rng), "lora_magnitude_vector": _lengths(site)},
        normal_form=_normal_form,
        examples=(DoRA(r=1), DoRA(r=3, alpha=5), DoRA(r=5, alpha=4, use_rslora=True, dropout=0.1)),
        training=Training(rates=lora.training.rates),
        storage=Storage(expanded_size=factors, constants=lambda cfg, site: {"lengths": _lengths(site)}),
        peft=derive_form(
            DoRA,
            "use_dora",
            suffixes={"lora_magnitude_vector": "lora_magnitude_vector"},
            write=lambda cfg: True,
            layers={
                "conv": PeftLayer(shapes_say_so=has_axes(3, 4, 5), stored=_as_kernels, loaded=_from_kernels),
                "embedding": PeftLayer({**EMBEDDED, "lora_magnitude_vector": "lora_magnitude_vector"}),
                **TRANSPOSED,
            },
            matches=lambda config: config.get("peft_type") == "LORA" and bool(config.get("use_dora")),
            refused_by={**LORA_ALONE, "transformers": "it leaves the lengths as the base has them"},
            **{**PLAIN_FILES, "from_peft_file": _require_plain_rows},
        ),
    )
)
