"""ShadowPEFT: a small second model whose state runs alongside the layers and corrects their inputs (Li et al.
2026, arXiv 2604.19254, section 3).

    h_l = o_(l-1) + alpha W_up W_down (o_(l-1) - s_(l-1)),   s_l = (1 - g) s_(l-1) + g T(o_l),   g =
    sigmoid(G(o_l))

as PEFT 0.21 computes it. s_0 is what a *backbone* gives for the same tokens, times P where its width is
another: a model of the base's own class, with fewer or narrower layers, whose tensors the adapter holds. W_up
begins at zero, and a fresh adapter changes nothing. With ``share_embeddings`` the backbone reads the base's
embeddings. The backbone has a cache of its own, which goes along with the base's.

PEFT's auxiliary loss, that of the backbone's own prediction, is not added here; its head is kept and comes
back in PEFT's folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from adapterpack.adapter_methods import kaiming
from adapterpack.adapter_methods.core.base import Method, Shared, Storage
from adapterpack.adapter_methods.core.config import (
    FOR_TRAINING,
    MOST_SITES,
    WIDEST,
    SiteConfig,
    require_flag,
    require_number,
    require_whole,
)
from adapterpack.adapter_methods.core.peft_form import NOT_IN_LAYERS, PeftContent
from adapterpack.adapter_methods.core.site import Params, Site
from adapterpack.adapter_methods.peft.keys import PeftKeys
from adapterpack.errors import Unsupported

from .form import TRAITS, ShadowForm, TwoLayers

BACKBONE, PROJECTION, HEAD = "backbone", "projection", "head"
"""What the names of shared tensors begin with; behind it and ``_`` stands the path in that module, with ``/``
for each dot.
"""
_MOST_AXES = 8
_SIZES = (
    "shadow_num_hidden_layers",
    "shadow_hidden_size",
    "shadow_num_attention_heads",
    "shadow_intermediate_size",
)


@dataclass(frozen=True)
class ShadowSite(Site):
    """A layer of a model that is there: ``draw`` makes the first tensors that all layers share, by their
    names, of a config and a seed.
    """

    draw: Callable[[Any, int], dict[str, np.ndarray]] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Shadow(SiteConfig):
    """``shadow_alpha`` is the step of a correction, ``update_hidden_size`` the width between the two layers
    of T and of G (None: ``r``).

    The backbone is the base with ``shadow_num_hidden_layers`` layers (None: one); what else is None is as in
    the base. ``tensors`` are the names and shapes of what the adapter holds besides its sites' parameters;
    the model says them.

    Example:
        >>> Shadow(r=4, shadow_num_hidden_layers=2).update_width
        4
    """

    targets: str | tuple[str, ...] = field(default="all-layers", metadata=FOR_TRAINING)
    r: int = 8
    shadow_alpha: float = 0.1
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.0
    tensors: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("r", self.r)
        require_flag("share_embeddings", self.share_embeddings)
        for name in ("shadow_alpha", "auxiliary_loss_weight"):
            require_number(name, getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in (*_SIZES, "update_hidden_size"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name))
        if not isinstance(self.tensors, list | tuple) or len(self.tensors) > MOST_SITES:
            raise ValueError(f"tensors must be at most {MOST_SITES} names with their shapes")
        object.__setattr__(self, "tensors", tuple(map(_named_shape, self.tensors)))

    @property
    def rank(self) -> int:
        """The inner dimension of W_up and W_down."""
        return self.r

    @property
    def update_width(self) -> int:
        """The width between the two layers of T and of G."""
        return self.update_hidden_size or self.r


def _named_shape(entry: Any) -> tuple[str, tuple[int, ...]]:
    name, shape = entry
    if (
        not isinstance(name, str)
        or not name.startswith((f"{BACKBONE}_", f"{PROJECTION}_", f"{HEAD}_"))
        or len(name) > 400
    ):
        raise ValueError(
            f"a tensor of the backbone, its projection or its head was expected, not {name!r:.80}"
        )
    if not isinstance(shape, list | tuple) or len(shape) > _MOST_AXES:
        raise ValueError(f"{name} has no shape of at most {_MOST_AXES} axes")
    for length in shape:
        require_whole(name, length, 0, WIDEST)
    return name, tuple(shape)


_LAYERS = {
    f"{part}_{place}": f"shadow_update_{part}.default.{number}"
    for part in ("transform", "gate")
    for place, number in (("first", 0), ("second", 2))
}
"""The layers of T and G by our name -> PEFT's."""
_SUFFIXES = {
    "down": "shadow_down.default.weight",
    "up": "shadow_up.default.weight",
    **{layer: f"{theirs}.weight" for layer, theirs in _LAYERS.items()},
    **{f"{layer}_bias": f"{theirs}.bias" for layer, theirs in _LAYERS.items()},
}


def _shapes(cfg: Shadow, site: Site) -> dict[str, tuple[int, ...]]:
    width, inner = site.out_features, cfg.update_width
    sides: dict[str, tuple[int, ...]] = {
        "first": (inner, width),
        "first_bias": (inner,),
        "second": (width, inner),
        "second_bias": (width,),
    }
    return {
        "down": (cfg.r, width),
        "up": (width, cfg.r),
        **{f"{part}_{name}": shape for part in ("transform", "gate") for name, shape in sides.items()},
    }


def _init(cfg: Shadow, site: Site, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = _shapes(cfg, site)
    made = {name: kaiming(rng, shape) for name, shape in shapes.items() if len(shape) == 2}
    for name, shape in shapes.items():
        if len(shape) == 1:  # as torch begins a Linear
            bound = 1 / math.sqrt(shapes[name.removesuffix("_bias")][1])
            made[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
    return {name: 0 * made[name] if name == "up" else made[name] for name in shapes}


def _shared_shapes(cfg: Shadow, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    return dict(cfg.tensors)


def _shared_init(cfg: Shadow, sites: Sequence[Site], rng: np.random.Generator) -> dict[str, np.ndarray]:
    draw = next((site.draw for site in sites if isinstance(site, ShadowSite) and site.draw is not None), None)
    if draw is not None:
        return draw(cfg, int(rng.integers(1 << 31)))
    return {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in cfg.tensors}


def _normal_form(cfg: Shadow, params: Params, site: Site) -> ShadowForm:
    transform, gate = (
        TwoLayers(*(params[f"{part}_{name}"] for name in ("first", "first_bias", "second", "second_bias")))
        for part in ("transform", "gate")
    )
    return ShadowForm(params["down"], params["up"], cfg.shadow_alpha, transform, gate)


_KEYS = PeftKeys(
    Shadow,
    {
        "r": 8,
        "shadow_alpha": 0.1,
        "dropout": 0.2,
        **dict.fromkeys(_SIZES),
        "share_embeddings": True,
        "update_hidden_size": None,
        "auxiliary_loss_weight": 0.05,
    },
    {"shadow_model": "mirror", "init_weights": True},
    renamed={"dropout": "shadow_dropout"},
)


def _from_peft(config: Mapping[str, Any]) -> Any:
    if (source := config.get("shadow_model", "mirror")) != "mirror":
        raise Unsupported(
            "the second model of this adapter is a checkpoint elsewhere, which the folder names and "
            "does not hold",
            where="shadow_model",
            found=repr(source)[:80],
            expected="mirror",
            remedy="run it with PEFT, or train one whose backbone mirrors the base",
        )
    return _KEYS.from_config({**config, "init_weights": True})


def _with_tensors(content: PeftContent) -> PeftContent:
    """The config with the names and shapes of the second model's tensors, which PEFT's config leaves out."""
    names = tuple((name, value.shape) for name, value in sorted(content.shared.items()))
    return content._replace(config=replace(content.config, tensors=names))


def _features(params: Params) -> tuple[int, int]:
    return params["down"].shape[1], params["down"].shape[1]


_STATE = "its state comes from a second model with a cache of its own: a graph's slots hold neither"

shadow = Method(
    name="shadow",
    summary="a small second model whose state runs alongside the layers and corrects their inputs",
    paper="https://arxiv.org/abs/2604.19254",
    formula="h_l = o + alpha W_up W_down (o - s), s' = (1 - g) s + g T(o_l), g = sigmoid(G(o_l))",
    kind="shadow",
    config=Shadow,
    traits=TRAITS,
    shapes=_shapes,
    init=_init,
    normal_form=_normal_form,
    examples=(
        Shadow(r=2),
        Shadow(r=3, shadow_num_hidden_layers=2, update_hidden_size=5, shadow_alpha=0.5),
        Shadow(r=2, shadow_hidden_size=8, shadow_intermediate_size=5),
    ),
    storage=Storage(shared=Shared(_shared_shapes, _shared_init)),
    overrides={"refuse": lambda stage: _STATE if stage == "graph" else ""},
    peft=_KEYS.form(
        peft_type="SHADOW",
        suffixes=_SUFFIXES,
        from_config=_from_peft,
        features=_features,
        from_peft_file=_with_tensors,
        refused_by=NOT_IN_LAYERS,
        shared={name: f"base_model.shadow_{name}.default" for name in (BACKBONE, PROJECTION, HEAD)},
    ),
)
