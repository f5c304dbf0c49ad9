"""PaRa: removes a subspace of the outputs from the weight (Chen et al. 2024, arXiv 2406.05641; DEFT with P
alone).

    W' = W - Q Z^T W

P ``[out, r]`` is trained; Q and Z are computed from it as in DEFT. A fresh adapter already removes something.
In PEFT this is DEFT's option ``para``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from . import (
    METHODS,
    Dense,
    NormalForm,
    Params,
    PeftForm,
    RankConfig,
    Shapes,
    Site,
    array_namespace,
    normal,
    widths_of,
    zeros,
)
from .deft import deft, sides


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


def _to_peft(sites: Mapping[str, Any]) -> dict[str, Any]:
    first: PaRa = next(iter(sites.values()))
    return {
        "r": first.r,
        "alpha": None,
        "deft_dropout": first.dropout,
        "decomposition_method": first.decomposition_method,
        "para": True,
        "init_scale": 1.0,
        "init_weights": True,
        "fan_in_fan_out": False,
        "bias": "none",
    }


def _form(of_deft: PeftForm) -> PeftForm:
    return of_deft._replace(
        suffixes={"deft_P": "deft_P"},
        to_config=_to_peft,
        from_config=lambda config: PaRa(
            r=config.get("r", 8),
            dropout=config.get("deft_dropout", 0.0),
            decomposition_method=config.get("decomposition_method", "relu"),
        ),
        features=widths_of(None, "deft_P"),
        matches=lambda config: config.get("peft_type") == of_deft.peft_type and config.get("para") is True,
    )


assert deft.peft is not None  # for the type checker
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
        peft=_form(deft.peft),
    )
)
