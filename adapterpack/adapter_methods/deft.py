"""DEFT: removes a subspace of the outputs from the weight and puts a trained change in its place (as in PEFT;
its documentation describes the method).

    W' = W - Q Z^T W + s Q R

P ``[out, r]`` and R ``[r, in]`` are trained. With ``relu``, Q is P and Z its positive part; with ``qr``, both
are the orthonormal columns of P, so that ``Q Z^T`` is a projection. R starts as ``Z^T W / s``, so that a
fresh adapter changes nothing except by rounding. Without R this is PaRa. If a layer has fewer outputs than r,
their number replaces r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from . import (
    MATRICES,
    METHODS,
    NO_EXTRAS,
    TRANSPOSED,
    Array,
    Arrays,
    Dense,
    Method,
    NormalForm,
    Params,
    PeftKeys,
    PositiveFloat,
    Random,
    RankConfig,
    Shapes,
    Site,
    Traits,
    array_namespace,
    normal,
    widths_of,
)
from .core.orthogonal import linear


@dataclass(frozen=True)
class DEFT(RankConfig):
    """The hyper-parameters of DEFT; without ``alpha`` s is 1, else ``alpha / r``.

    Example:
        >>> DEFT(r=8).scale, DEFT(r=8, alpha=4).scale
        (1.0, 0.5)
    """

    alpha: PositiveFloat | None = None
    decomposition_method: Literal["relu", "qr"] = "relu"

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies ``Q R``."""
        return 1.0 if self.alpha is None else self.alpha / self.r


def _shapes(cfg: DEFT, site: Site) -> Shapes:
    r = min(cfg.r, site.out_features)
    return {"deft_P": (site.out_features, r), "deft_R": (r, site.in_features)}


def _init(cfg: DEFT, site: Site, rng: Random) -> Arrays:
    P = normal(rng, _shapes(cfg, site)["deft_P"])
    _, Z = sides(cfg.decomposition_method, P)
    return {"deft_P": P, "deft_R": (Z.T @ np.asarray(site.weight) / cfg.scale).astype(np.float32)}


def sides(method: str, P: Array) -> tuple[Array, Array]:
    """Returns Q and Z ``[out, r]`` computed from P by the method ``relu`` or ``qr``."""
    xp = array_namespace(P)
    if method == "relu":
        return P, xp.clip(P, 0, None)
    Q = linear(lambda wide: xp.linalg.qr(wide)[0], P)
    return Q, Q


def _normal_form(cfg: DEFT, params: Params, site: Site) -> NormalForm:
    Q, Z = sides(cfg.decomposition_method, params["deft_P"])
    xp = array_namespace(Q, Z)
    return NormalForm(down=Dense(cfg.scale * params["deft_R"] - xp.matmul(Z.T, site.weight)), up=Dense(Q))


CONSTANTS = {**NO_EXTRAS, "para": False, "init_scale": 1.0}
"""The keys of PEFT's config that have fixed values."""
_KEYS = PeftKeys(
    DEFT,
    ("r", "alpha", "dropout", "decomposition_method"),
    CONSTANTS,
    renamed={"dropout": "deft_dropout"},
    whole=("alpha",),
)

deft = METHODS.register(
    Method(
        name="deft",
        summary="a subspace of the outputs taken out of the weight, and something trained put there",
        paper="https://huggingface.co/docs/peft/package_reference/deft",
        formula="W' = W - Q Z^T W + s Q R",
        config=DEFT,
        traits=Traits(identity_at_init=False, reads_weight=True, layers=MATRICES),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(DEFT(r=1), DEFT(r=3, alpha=2), DEFT(r=4, dropout=0.1)),
        peft=_KEYS.form(
            peft_type="DEFT",
            suffixes=("deft_P", "deft_R"),
            layers=TRANSPOSED,
            features=widths_of("deft_R", "deft_P"),
            matches=lambda config: config.get("peft_type") == "DEFT" and not config.get("para"),
        ),
    )
)
