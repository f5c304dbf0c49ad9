"""PaRa: removes a subspace of the outputs from the weight (Chen et al. 2024, arXiv 2406.05641; DEFT with P
alone).

    W' = W - Q Z^T W

P ``[out, r]`` is trained; Q and Z are computed from it as in DEFT. A fresh adapter already removes something.
In PEFT this is DEFT's option ``para``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from . import (
    METHODS,
    TRANSPOSED,
    Dense,
    NormalForm,
    Params,
    PeftKeys,
    RankConfig,
    Shapes,
    Site,
    array_namespace,
    normal,
    widths_of,
    zeros,
)
from .deft import CONSTANTS, deft, sides


@dataclass(frozen=True)
class PaRa(RankConfig):
    """The hyper-parameters of PaRa.

    Example:
        >>> PaRa(r=8, decomposition_method="qr").rank
        8
    """

    decomposition_method: Literal["relu", "qr"] = "relu"


def _shapes(cfg: PaRa, site: Site) -> Shapes:
    return {"deft_P": (site.out_features, min(cfg.r, site.out_features))}


def _normal_form(cfg: PaRa, params: Params, site: Site) -> NormalForm:
    Q, Z = sides(cfg.decomposition_method, params["deft_P"])
    xp = array_namespace(Q, Z)
    return NormalForm(down=Dense(xp.matmul(Z.T, site.weight)), up=Dense(Q, -1.0))


_KEYS = PeftKeys(
    PaRa,
    ("r", "dropout", "decomposition_method"),
    {**CONSTANTS, "alpha": None, "para": True},
    renamed={"dropout": "deft_dropout"},
)

para = METHODS.register(
    deft._replace(
        name="para",
        summary="a subspace of the outputs taken out of the weight",
        paper="https://arxiv.org/abs/2406.05641",
        formula="W' = W - Q Z^T W",
        config=PaRa,
        traits=replace(deft.traits, layers=deft.traits.layers[:2], min_features=(2, 1)),
        shapes=_shapes,
        init=zeros(_shapes, deft_P=normal),
        normal_form=_normal_form,
        examples=(PaRa(r=2), PaRa(r=3, decomposition_method="qr", dropout=0.1)),
        peft=_KEYS.form(
            peft_type="DEFT",
            suffixes=("deft_P",),
            layers=TRANSPOSED,
            features=widths_of(None, "deft_P"),
            matches=lambda config: config.get("peft_type") == "DEFT" and config.get("para") is True,
        ),
    )
)
