"""PVeRA: VeRA whose inner values are drawn from a learned normal distribution during training (arXiv
2512.07703, section 3).

    y' = base(x) + b * (B z),   z ~ N(mu, diag(exp(v))),   [mu; v] = d * (A x)

A has shape [2 r, in], B has shape [out, r], d has 2 r numbers, b has ``out``; v are log-variances. After
training z is its mean mu, so an adapter is a VeRA with the first r rows of A and numbers of d; the other half
only matters in training. The frozen A and B are drawn as in VeRA, with the numbers that PEFT draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import Unsupported
from . import (
    FOR_TRAINING,
    LINEAR,
    METHODS,
    NO_EXTRAS,
    SHARES_A_PART,
    TRANSPOSED,
    Array,
    Dense,
    Method,
    NormalForm,
    Params,
    PeftConfig,
    PeftKeys,
    Scaled,
    Shapes,
    Site,
    Traits,
    array_namespace,
    widths_of,
    zeros,
)
from .vera import VeRA, project


@dataclass(frozen=True)
class PVeRA(VeRA):
    """The hyper-parameters of PVeRA. Without ``sample`` training takes the mean, too, and leaves the
    variances as they began.

    Example:
        >>> PVeRA(r=64, targets=("q_proj", "v_proj")).sample
        True
    """

    sample: bool = field(default=True, compare=False, metadata=FOR_TRAINING)


_PROJECTION = project("pvera_A", "pvera_B", lambda cfg: 2 * cfg.r)


class _Drawn(NamedTuple):
    """The down projection in training: ``mean x`` plus normal noise whose log-variances are
    ``log_variance x``. Only for torch, because only training uses it.
    """

    mean: Array
    log_variance: Array

    def apply(self, x: Array) -> Array:
        """Draws a new z at every call: ``[..., in]`` to ``[..., r]``."""
        xp = array_namespace(x)
        deviation = xp.exp(0.5 * (x @ self.log_variance.T))
        return x @ self.mean.T + deviation * deviation.new_empty(deviation.shape).normal_()


def _shapes(cfg: PVeRA, site: Site) -> Shapes:
    return {"pvera_lambda_b": (site.out_features,), "pvera_lambda_d": (2 * cfg.r,)}


def _normal_form(cfg: PVeRA, params: Params, site: Site) -> NormalForm:
    A = params["pvera_A"][: cfg.r, : site.in_features]
    B = params["pvera_B"][: site.out_features]
    return NormalForm(
        down=Dense(A), up=Scaled(B, params["pvera_lambda_b"], params["pvera_lambda_d"][: cfg.r])
    )


def _sample(cfg: PVeRA, params: Params, site: Site) -> NormalForm:
    """Returns the normal form for training, in which z is drawn."""
    if not cfg.sample:
        return _normal_form(cfg, params, site)
    A = params["pvera_A"][:, : site.in_features]
    d = params["pvera_lambda_d"][:, None]
    xp = array_namespace(d)
    ones = xp.ones_like(params["pvera_lambda_d"][: cfg.r])
    drawn: Any = _Drawn(d[: cfg.r] * A[: cfg.r], d[cfg.r :] * A[cfg.r :])
    return NormalForm(
        down=drawn, up=Scaled(params["pvera_B"][: site.out_features], params["pvera_lambda_b"], ones)
    )


_KEYS = PeftKeys(
    PVeRA,
    {"r": 256, "projection_prng_key": 0, "save_projection": True, "dropout": 0.0, "d_initial": 0.1},
    {**NO_EXTRAS, "sample_at_inference": False, "generator_seed": None},
    renamed={"dropout": "pvera_dropout"},
)


def _from_peft(config: PeftConfig) -> Any:
    if config.get("sample_at_inference"):
        raise Unsupported(
            "this adapter gives another output at every call, drawn at random",
            where="sample_at_inference",
            expected="false",
            found="true",
            remedy="set it to false: the adapter then gives the mean",
        )
    return _KEYS.from_config(config)


pvera = METHODS.register(
    Method(
        name="pvera",
        summary=(
            "VeRA whose inner numbers are drawn from a learned distribution in training, and are its mean "
            "afterwards"
        ),
        paper="https://arxiv.org/abs/2512.07703",
        formula="y' = W x + b + b' * (B z),  z ~ N(d_1 * (A_1 x), exp(d_2 * (A_2 x))),  trained: its mean",
        config=PVeRA,
        traits=Traits(additive=True, low_rank=True, frozen=_PROJECTION.names, layers=LINEAR),
        shapes=_shapes,
        init=lambda cfg, site, rng: zeros(_shapes, pvera_lambda_d=cfg.d_initial)(cfg, site, rng),
        normal_form=_normal_form,
        examples=(
            PVeRA(r=3, sample=False),
            PVeRA(r=5, projection_prng_key=7, d_initial=0.5, dropout=0.1, sample=False),
        ),
        overrides={"training_form": _sample},
        storage=_PROJECTION.storage,
        peft=_KEYS.form(
            peft_type="PVERA",
            suffixes=("pvera_lambda_b", "pvera_lambda_d"),
            layers=TRANSPOSED,
            from_config=_from_peft,
            features=widths_of(None, "pvera_lambda_b"),
            shared={"pvera_A": "base_model.pvera_A", "pvera_B": "base_model.pvera_B"},
            from_peft_file=_PROJECTION.from_peft_file,
            refused_by=SHARES_A_PART,
        ),
    )
)
