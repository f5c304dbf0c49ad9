"""HiRA: multiplies the weight elementwise by a low-rank matrix, so that the change has full rank (Huang et
al. 2025, ICLR, HiRA).

    W' = W + W * (B A)

``*`` is elementwise; A is ``[r, in]``, B ``[out, r]``, and there is no scale. All sites have the same rank:
PEFT has a ``rank_pattern``, but its layers ignore it.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import (
    MATRICES,
    METHODS,
    TRANSPOSED,
    Dense,
    Method,
    NormalForm,
    Params,
    PeftKeys,
    PeftLayer,
    RankConfig,
    Shapes,
    Site,
    Traits,
    array_namespace,
    as_kernels,
    has_axes,
    kaiming,
    widths_of,
    zeros,
)


@dataclass(frozen=True)
class HiRA(RankConfig):
    """The hyper-parameters of HiRA.

    Example:
        >>> HiRA(r=16).scale
        1.0
    """


def _shapes(cfg: HiRA, site: Site) -> Shapes:
    return {"hira_A": (cfg.r, site.in_features), "hira_B": (site.out_features, cfg.r)}


def _normal_form(cfg: HiRA, params: Params, site: Site) -> NormalForm:
    A, B = params["hira_A"], params["hira_B"]
    return NormalForm(down=Dense(site.weight * array_namespace(A, B).matmul(B, A)))


_KEYS = PeftKeys(
    HiRA,
    {"r": 32, "dropout": 0.0},
    {"rank_pattern": {}, "init_weights": True, "fan_in_fan_out": False},
    renamed={"dropout": "hira_dropout"},
)

hira = METHODS.register(
    Method(
        name="hira",
        summary="the weight multiplied elementwise by a low-rank matrix: a change of full rank",
        paper="https://openreview.net/forum?id=TwJrTz9cRS",
        formula="W' = W + W * (B A), elementwise",
        config=HiRA,
        traits=Traits(reads_weight=True, layers=MATRICES),
        shapes=_shapes,
        init=zeros(_shapes, hira_A=kaiming),
        normal_form=_normal_form,
        examples=(HiRA(r=1), HiRA(r=3), HiRA(r=4, dropout=0.1)),
        peft=_KEYS.form(
            peft_type="HIRA",
            suffixes=("hira_A", "hira_B"),
            layers={
                "conv": PeftLayer(shapes_say_so=has_axes(3, 4, 5), stored=as_kernels("hira_A", "hira_B")),
                "embedding": PeftLayer({"hira_A": "hira_embedding_A", "hira_B": "hira_embedding_B"}),
                **TRANSPOSED,
            },
            features=widths_of("hira_A", "hira_B"),
        ),
    )
)
