"""AdaLoRA: LoRA with trained singular values between the factors, and a rank budget that moves to the sites
that need it (Zhang et al. 2023, arXiv 2303.10512).

    y' = base(x) + s B diag(E) A x,   s = alpha / (init_r + 1e-5), as PEFT has it

A ``[r, in]``, E ``[r, 1]``, B ``[out, r]``. A triplet is one value of E with its row of A and its column of
B. During training the values E of the least important triplets of all sites are set to zero (section 3.3): an
entry p with gradient g has the sensitivity ``|p g|``, smoothed by beta1, and an uncertainty, its deviation
from that, smoothed by beta2. Their product is the entry's score; the score of a triplet is that of its E plus
the means over its row of A and its column of B. Between the steps tinit and total - tfinal the total rank
falls from init_r to target_r per site on a cubic schedule, every deltaT steps. Values that are zero
afterwards stay zero, and a pack does not store them. A penalty keeps A and B close to orthogonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta

from . import (
    LARGEST_WHOLE,
    MATRICES,
    METHODS,
    TRANSPOSED,
    Array,
    Arrays,
    Dense,
    FiniteFloat,
    Method,
    NormalForm,
    Params,
    PeftConfig,
    PeftKeys,
    PeftLayer,
    PositiveInt,
    Progress,
    Shapes,
    Site,
    SiteConfig,
    SiteConfigs,
    Storage,
    TrainedSite,
    Traits,
    array_namespace,
    normal,
    pattern_of,
    require_whole,
    set_defaults,
    widths_of,
    zeros,
)
from .kasa import departure

Steps = Annotated[int, Meta(ge=0, le=LARGEST_WHOLE)]
"""The type of a number of steps, which may be zero."""


@dataclass(frozen=True)
class AdaLoRA(SiteConfig):
    """The hyper-parameters of AdaLoRA, named as PEFT has them; ``alpha`` defaults to ``2 init_r``.

    ``total_step=None`` means the length of the training run. ``r`` is a site's remaining rank: ``init_r``
    until a pack is written.

    Example:
        >>> AdaLoRA(init_r=12, target_r=8).rank
        12
    """

    init_r: PositiveInt = 12
    target_r: PositiveInt = 8
    alpha: FiniteFloat | None = None
    tinit: Steps = 0
    tfinal: Steps = 0
    deltaT: Annotated[int, Meta(ge=1, le=LARGEST_WHOLE)] = 1  # noqa: N815 - the paper's and PEFT's name
    beta1: FiniteFloat = 0.85
    beta2: FiniteFloat = 0.85
    orth_reg_weight: FiniteFloat = 0.5
    total_step: int | None = None
    r: PositiveInt | None = None
    rank_pattern: Mapping[str, int] = pattern_of("r")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_step is not None:
            require_whole("total_step", self.total_step, self.tinit + self.tfinal + 1, LARGEST_WHOLE)
        set_defaults(self, alpha=2.0 * self.init_r, r=self.init_r)

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies ``B diag(E) A``."""
        return float(self.alpha or 0.0) / (self.init_r + 1e-5)

    @property
    def rank(self) -> int | None:
        """The number of singular values."""
        return self.r


def _shapes(cfg: AdaLoRA, site: Site) -> Shapes:
    r = cfg.r or cfg.init_r
    return {"lora_A": (r, site.in_features), "lora_B": (site.out_features, r), "lora_E": (r, 1)}


def _penalty(cfg: AdaLoRA, params: Params, sites: int) -> Array:
    """Returns this site's share of the penalty: ``orth_reg_weight`` times the mean over all A and B of ``||G
    - I||_F``, where G is ``A A^T`` or ``B^T B``.
    """
    A, B = params["lora_A"], params["lora_B"]
    xp = array_namespace(A, B)
    return cfg.orth_reg_weight / (2 * sites) * (departure(xp.matmul(A, A.T)) + departure(xp.matmul(B.T, B)))


class _State(NamedTuple):
    """The state between optimizer steps: smoothed sensitivity and uncertainty (site -> parameter -> array of
    its shape), and the triplets that stay zero (site -> ``[r, 1]`` mask).
    """

    sensitivity: Mapping[str, Params]
    uncertainty: Mapping[str, Params]
    gone: Mapping[str, Array] | None


def _after_step(
    progress: Progress, state: _State | None, sites: Mapping[str, TrainedSite]
) -> tuple[_State, dict[str, dict[str, Array]]]:
    """Updates the importance of all triplets after an optimizer step and sets the E values of the least
    important triplets to zero.
    """
    cfg = next(iter(sites.values())).config
    last = (cfg.total_step or progress.total) - cfg.tfinal
    state = state or _State({}, {}, None)
    if progress.step < last:
        state = _observe(cfg, state, sites)
    first = sum(site.params["lora_E"].shape[0] for site in sites.values())
    final = cfg.target_r * len(sites)
    # From here on the choice is final, and the remaining steps train the values that are left.
    if progress.step >= last and state.gone is None:
        state = state._replace(gone=_least(state, first - final))
        gone = state.gone
    elif state.gone is not None:
        gone = state.gone
    elif progress.step > cfg.tinit and progress.step % cfg.deltaT == 0:
        # The cubic schedule of section 3.3: the number of remaining values falls from `first` to `final`.
        left = 1 - (progress.step - cfg.tinit) / (last - cfg.tinit)
        gone = _least(state, first - int((first - final) * left**3 + final))
    else:
        gone = {}
    return state, {
        path: {"lora_E": sites[path].params["lora_E"] * (1 - which)} for path, which in (gone or {}).items()
    }


def _observe(cfg: AdaLoRA, state: _State, sites: Mapping[str, TrainedSite]) -> _State:
    """Smooths sensitivity and uncertainty by equations 9 to 11."""
    sensitivity: dict[str, Params] = {}
    uncertainty: dict[str, Params] = {}
    for path, site in sites.items():
        xp = array_namespace(*site.params.values())
        now = {name: xp.abs(value * site.gradients[name]) for name, value in site.params.items()}
        smooth = _smooth(cfg.beta1, state.sensitivity.get(path), now)
        sensitivity[path] = smooth
        uncertainty[path] = _smooth(
            cfg.beta2, state.uncertainty.get(path), {name: xp.abs(now[name] - smooth[name]) for name in now}
        )
    return state._replace(sensitivity=sensitivity, uncertainty=uncertainty)


def _smooth(beta: float, before: Params | None, now: Params) -> dict[str, Array]:
    return {
        name: (1 - beta) * value + (0 if before is None else beta * before[name])
        for name, value in now.items()
    }


def _least(state: _State, count: int) -> dict[str, Array]:
    """Returns the ``count`` triplets with the lowest scores, including ties: site -> ``[r, 1]`` mask of ones
    and zeros.
    """
    scores = {}
    for path in state.sensitivity:
        score = {
            name: value * state.uncertainty[path][name] for name, value in state.sensitivity[path].items()
        }
        xp = array_namespace(*score.values())
        scores[path] = (
            score["lora_E"][:, 0] + xp.mean(score["lora_A"], axis=1) + xp.mean(score["lora_B"], axis=0)
        )
    if count <= 0 or not scores:
        return {}
    threshold = xp.sort(xp.concat(list(scores.values())))[count - 1]
    return {path: xp.astype(score <= threshold, score.dtype)[:, None] for path, score in scores.items()}


def _to_pack(cfg: AdaLoRA, params: Params, site: Site) -> tuple[AdaLoRA, Arrays]:
    """Removes the triplets whose value is zero, except one if all are, because a site needs a rank.

    A stacked site has one rank: that of the matrix with the most remaining triplets. The other matrices keep
    some of their zeros.
    """
    zero = np.asarray(params["lora_E"])[..., 0] == 0
    r = max(1, int((~zero).sum(axis=-1).max()))
    kept = np.argsort(zero, axis=-1, kind="stable")[..., :r]  # nonzero values first, in their order
    rows = kept[..., :, None]
    columns = kept[..., None, :]
    return replace(cfg, r=r, total_step=_total(cfg)), {
        "lora_A": np.take_along_axis(params["lora_A"], rows, axis=-2),
        "lora_B": np.take_along_axis(params["lora_B"], columns, axis=-1),
        "lora_E": np.take_along_axis(params["lora_E"], rows, axis=-2),
    }


def _total(cfg: AdaLoRA) -> int:
    """Returns the total number of steps; PEFT requires a number even if nothing will be trained."""
    return cfg.total_step or cfg.tinit + cfg.tfinal + 1


_KEYS = PeftKeys(
    AdaLoRA,
    {
        "init_r": 12,
        "target_r": 8,
        "alpha": 8,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "total_step": None,
        "dropout": 0.0,
    },
    # PEFT ignores r but warns if it is not 8
    {"r": 8, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True},
    renamed={"alpha": "lora_alpha", "dropout": "lora_dropout"},
    whole=("alpha",),
)


def _to_peft(sites: SiteConfigs) -> PeftConfig:
    pattern = {
        f"{path}.lora_E": [True] * cfg.r + [False] * (cfg.init_r - cfg.r)
        for path, cfg in sites.items()
        if cfg.r < cfg.init_r
    }
    first = next(iter(sites.values()))
    return {**_KEYS.to_config(sites), "total_step": _total(first), "rank_pattern": pattern or None}


def _from_peft(config: PeftConfig) -> Any:
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, Mapping) or not all(isinstance(value, list) for value in pattern.values()):
        raise ValueError(f"rank_pattern must map names to lists of truth values, not {pattern!r:.80}")
    ranks = {f"^{name.removesuffix('.lora_E')}": sum(map(bool, value)) for name, value in pattern.items()}
    return replace(_KEYS.from_config(config), rank_pattern=ranks)


adalora = METHODS.register(
    Method(
        name="adalora",
        summary=(
            "low-rank changes with singular values, and a budget of rank that training shares out among the "
            "sites"
        ),
        paper="https://arxiv.org/abs/2303.10512",
        formula="y' = W x + b + s B diag(E) A x,  s = alpha / (r + 1e-5)",
        config=AdaLoRA,
        traits=Traits(additive=True, low_rank=True, layers=MATRICES),
        shapes=_shapes,
        init=zeros(_shapes, lora_A=normal, lora_B=normal),
        normal_form=lambda cfg, params, site: NormalForm(
            down=Dense(params["lora_A"] * params["lora_E"]), up=Dense(cfg.scale * params["lora_B"])
        ),
        examples=(
            AdaLoRA(init_r=1, target_r=1),
            AdaLoRA(init_r=3, target_r=2, alpha=5),
            AdaLoRA(init_r=5, alpha=4, tinit=3, dropout=0.1),
        ),
        overrides={"penalty": _penalty, "after_step": _after_step},
        storage=Storage(to_stored=_to_pack),
        peft=_KEYS.form(
            peft_type="ADALORA",
            suffixes=("lora_A", "lora_B", "lora_E"),
            layers={"conv": PeftLayer(), **TRANSPOSED},
            to_config=_to_peft,
            from_config=_from_peft,
            features=widths_of("lora_A", "lora_B"),
        ),
    )
)
