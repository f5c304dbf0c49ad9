"""LoRA: a low-rank change added to a frozen layer (Hu et al. 2021, arXiv 2106.09685, section 4.1).

    y' = base(x) + s * B (A x)
    s = alpha / r,  or  alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)

A has shape [r, in], B has shape [out, r]. An init whose B A is not zero (methods/inits) is taken off again:

    y' = base(x) + s * (B A - B0 A0) x  =  base(x) + s * [B - B0, B0] [A; A - A0] x

which is zero at the start without any rounding, and is a plain LoRA of rank 2 r once it is packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from . import (
    FOR_TRAINING,
    INITS,
    LAYOUTS,
    LORA_ALONE,
    METHODS,
    TRANSPOSED,
    WEIGHTS,
    AlphaConfig,
    Array,
    Arrays,
    BlockDiagonal,
    Dense,
    Method,
    NormalForm,
    Params,
    PeftConfig,
    PeftForm,
    PeftKeys,
    PeftLayer,
    PositiveFloat,
    Random,
    Shapes,
    Site,
    SiteConfigs,
    Storage,
    Training,
    Traits,
    array_namespace,
    as_kernels,
    has_axes,
)
from .core.layouts import STACKS
from .peft.attention import attention_parameters
from .peft.base_change import undo_base_change, widen
from .peft.lora_variants import FOR_TRAINING_ALONE, READ_AS_LORA, as_lora
from .peft.parameters import KEY as TARGET_PARAMETERS
from .peft.parameters import targeted_parameters, to_peft_factors


@dataclass(frozen=True)
class LoRA(AlphaConfig):
    """The hyper-parameters of LoRA; ``alpha`` defaults to ``2 r``.

    ``lr_ratio`` trains B at that multiple of A's learning rate (LoRA+, Hayou et al. 2024, arXiv 2402.12354,
    section 4).

    Example:
        >>> LoRA(r=8, alpha=16).scale
        2.0
        >>> LoRA(r=4, use_rslora=True, alpha=4).scale
        2.0
    """

    use_rslora: bool = False
    lr_ratio: PositiveFloat | None = field(default=None, metadata=FOR_TRAINING)
    init: str = field(default="default", metadata=FOR_TRAINING)
    init_options: Mapping[str, Any] = field(default_factory=dict, metadata=FOR_TRAINING)

    def __post_init__(self) -> None:
        super().__post_init__()
        options = INITS[str(self.init)].options
        if unknown := sorted(set(self.init_options) - set(options)):
            raise ValueError(f"the init {self.init!r} has no option {unknown[0]!r}, only {sorted(options)}")

    @property
    def scale(self) -> float:
        """``s``, the number that multiplies ``B A``."""
        return float(self.alpha or 0.0) / (math.sqrt(self.r) if self.use_rslora else self.r)

    def alpha_at(self, r: int) -> float:
        """Returns the alpha that gives the same scale at another rank."""
        return self.scale * (math.sqrt(r) if self.use_rslora else r)

    @property
    def rank(self) -> int:
        """The inner dimension of the branch."""
        return 2 * self.r if INITS[self.init].cancels else self.r

    @property
    def frozen(self) -> frozenset[str]:
        """The factor that the init freezes, and the start that is subtracted."""
        return INITS[self.init].frozen | _START


_START = frozenset({"start_A", "start_B"})
"""A0 and B0, which exist only during training; a pack does not store them."""


def _shapes(cfg: LoRA, site: Site) -> Shapes:
    shares = site.stack if site.kind in LAYOUTS and LAYOUTS[site.kind].spanning else 1
    A = (cfg.r, site.in_features)
    B = (site.out_features, cfg.r // shares)
    return {"lora_A": A, "lora_B": B, **({"start_A": A, "start_B": B} if INITS[cfg.init].cancels else {})}


def _init(cfg: LoRA, site: Site, rng: Random) -> Arrays:
    init = INITS[cfg.init]
    A, B = init.make(cfg.r, cfg.scale, site, {**init.options, **cfg.init_options}, rng)
    return {"lora_A": A, "lora_B": B, **({"start_A": A.copy(), "start_B": B.copy()} if init.cancels else {})}


def _factors(params: Params) -> tuple[Array, Array]:
    """Returns ``down`` and ``up`` without the scale, including the subtracted start."""
    A, B = params["lora_A"], params["lora_B"]
    if "start_A" not in params:
        return A, B
    xp = array_namespace(A, B)
    A0, B0 = params["start_A"], params["start_B"]
    return xp.concat([A, A - A0], axis=-2), xp.concat([B - B0, B0], axis=-1)


def _normal_form(cfg: LoRA, params: Params, site: Site) -> NormalForm:
    down, up = _factors(params)
    # at a grouped convolution each group of outputs reads its own share of the rank
    if (shares := down.shape[-2] // max(1, up.shape[-1])) > 1:
        blocks = array_namespace(up).reshape(up, (shares, up.shape[0] // shares, up.shape[1]))
        return NormalForm(down=Dense(down), up=BlockDiagonal(cfg.scale * blocks))
    return NormalForm(down=Dense(down), up=Dense(up, cfg.scale))


def _to_pack(cfg: LoRA, params: Params, site: Site) -> tuple[LoRA, Arrays]:
    """Returns a plain LoRA: of rank 2 r if a start is subtracted, with an alpha that keeps the scale. Other
    parameters stay as they are.
    """
    A, B = _factors(params)
    r = A.shape[-2]
    kept = {name: value for name, value in params.items() if name not in _START}
    stored = {name: np.ascontiguousarray(value) for name, value in {**kept, "lora_A": A, "lora_B": B}.items()}
    return replace(cfg, r=r, alpha=cfg.alpha_at(r), init="default", init_options={}), stored


def _allocate(cfg: LoRA, sites: Sequence[Site]) -> LoRA:
    """Returns the config with the ranks that the init distributes, and with alphas that keep the scale of
    each site.
    """
    init = INITS[cfg.init]
    if init.ranks is None:
        return cfg
    before = {site.path: cfg.at(site.path) for site in sites}
    old = {path: cfg_here.r for path, cfg_here in before.items()}
    ranks = init.ranks(old, sites, {**init.options, **cfg.init_options})
    if ranks == old:
        return cfg
    alphas = {path: before[path].alpha_at(r) for path, r in ranks.items()}
    return replace(
        cfg,
        rank_pattern={f"^{path}": r for path, r in ranks.items()},
        alpha_pattern={f"^{p}": a for p, a in alphas.items()},
    )


def spans_groups(shapes: Shapes) -> bool:
    """Whether these are the shapes of PEFT's factors at a grouped convolution: B has a share of the rank for
    each group, and A reads all inputs.
    """
    down, up = shapes.get("lora_A.weight", ()), shapes.get("lora_B.weight", ())
    shared = len(down) > 2 and len(up) == len(down) and 0 < up[1] < down[0] and down[0] % up[1] == 0
    return shared and set(up[2:]) == {1} and up[0] % (down[0] // up[1]) == 0


SPANNING = PeftLayer(shapes_say_so=spans_groups, stored=as_kernels("lora_A", "lora_B"))
"""PEFT's factors at a grouped convolution, recognised by their shapes; it must be tried before other
convolutions.
"""
CONVOLUTION = SPANNING._replace(
    shapes_say_so=lambda shapes: has_axes(3, 4, 5)(shapes) and not spans_groups(shapes)
)
"""PEFT's factors at another convolution."""


OTHERS = ("use_dora", "kasa_config", "alora_invocation_tokens", "lora_bias")
"""The keys of PEFT's config that mark other methods of the type ``LORA``."""
EMBEDDED = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
"""PEFT's names of the factors at an embedding."""


_KEYS = PeftKeys(
    LoRA,
    {"r": 8, "alpha": 8, "use_rslora": False, "dropout": 0.0},
    # the `layers` below set `fan_in_fan_out` where it is true
    {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True},
    renamed={"alpha": "lora_alpha", "dropout": "lora_dropout"},
    whole=("alpha",),
)


def _to_peft(sites: SiteConfigs) -> PeftConfig:
    """Returns PEFT's keys. PEFT has one ``use_rslora`` for all sites, so a site with another value gets the
    alpha that gives it the same scale.
    """
    first = next(iter(sites.values()))
    root = math.sqrt if first.use_rslora else float
    same = {
        path: cfg if cfg.use_rslora == first.use_rslora else replace(cfg, alpha=cfg.scale * root(cfg.r))
        for path, cfg in sites.items()
    }
    return _KEYS.to_config(same)


def is_lora(config: PeftConfig, *marks: str) -> bool:
    """Whether a PEFT config is of the type ``LORA`` with just these keys that mark other methods."""
    return config.get("peft_type") == "LORA" and [key for key in OTHERS if config.get(key)] == [*marks]


_FORM = PeftForm(
    peft_type="LORA",
    suffixes={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
    to_config=_to_peft,
    from_config=_KEYS.from_config,
    features=lambda params: (params["lora_A"].shape[-2:][1], params["lora_B"].shape[-2]),
    matches=lambda config: is_lora(config) and config.get("bias") in (None, "none"),
    undo_base_change=undo_base_change,
    from_peft_file=lambda content: attention_parameters(targeted_parameters(widen(as_lora(content)))),
    known_keys=READ_AS_LORA | {TARGET_PARAMETERS},
    ignored_suffixes=FOR_TRAINING_ALONE,
    layers={"spanning_conv": SPANNING, "conv": CONVOLUTION, "embedding": PeftLayer(EMBEDDED), **TRANSPOSED},
    refused_by={},
    overrides={"bare_parameters": to_peft_factors},
)


def derive_form(
    kind: type[LoRA],
    key: str,
    suffixes: Mapping[str, str],
    write: Callable[[Any], Any],
    read: Callable[[Any], Mapping[str, Any]] = lambda value: {},
    **changes: Any,
) -> PeftForm:
    """Returns the PEFT form of a method derived from LoRA, which adds a ``key`` to PEFT's config and tensors
    with these ``suffixes``.

    ``write`` returns the key's value for a config, which is the same at all sites, and ``read`` the method's
    own hyper-parameters from the key's value. The other ``changes`` are fields of :class:`PeftForm`.
    """

    def to_config(sites: SiteConfigs) -> PeftConfig | None:
        value, *other_values = map(write, sites.values())
        return {**_to_peft(sites), key: value} if all(other == value for other in other_values) else None

    def from_config(config: PeftConfig) -> LoRA:
        plain = _KEYS.from_config(config)
        own = {field.name: getattr(plain, field.name) for field in fields(LoRA)}
        return kind(**own, **read(config.get(key)))

    derived = _FORM._replace(
        suffixes={**_FORM.suffixes, **suffixes},
        to_config=to_config,
        from_config=from_config,
        matches=lambda config: is_lora(config, key),
        known_keys=_FORM.known_keys | {key},
        refused_by=LORA_ALONE,
    )
    return derived._replace(**changes)


PLAIN_FILES: dict[str, Any] = {
    "from_peft_file": None,
    "known_keys": frozenset(),
    "ignored_suffixes": (),
    "overrides": {},
}
"""The ``changes`` of a method whose files PEFT has in fewer forms than those of LoRA."""


lora = METHODS.register(
    Method(
        name="lora",
        summary="a trained low-rank change added to each frozen layer; rsLoRA by use_rslora",
        paper="https://arxiv.org/abs/2106.09685",
        formula="y' = W x + b + s B A x,  s = alpha / r or alpha / sqrt(r)",
        config=LoRA,
        traits=Traits(additive=True, low_rank=True, layers=(*WEIGHTS, "spanning_conv", "embedding", *STACKS)),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            LoRA(r=1),
            LoRA(r=3, alpha=5),
            LoRA(r=4, alpha=4, use_rslora=True),
            LoRA(r=5, alpha=10, dropout=0.1),
            LoRA(r=3, init="gaussian"),
            LoRA(r=2, init="zeros"),
            LoRA(r=2, init="orthogonal"),
            LoRA(r=3, alpha=2, init="pissa"),
            LoRA(r=3, init="olora", use_rslora=True),
            LoRA(r=2, init="loftq"),
            LoRA(r=2, init="mica"),
        ),
        training=Training(
            needs=lambda cfg: INITS[cfg.init].needs,
            allocate=_allocate,
            rates=lambda cfg: {} if cfg.lr_ratio is None else {"lora_B": cfg.lr_ratio},
        ),
        storage=Storage(to_stored=_to_pack),
        peft=_FORM,
    )
)
