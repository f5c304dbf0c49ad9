"""GLoRA: scales and shifts the weight, and scales, shifts and adds a product of the weight to the bias
(Chavan et al. 2023, arXiv 2306.07967).

    W' = W + W * A + B,   b' = b + b * D + E + W C        (section 3.1, equation 10)

A and B are low-rank (``Xd Xu``, ``[out, r] [r, in]``), a column ``[out, 1]`` or one number; C is ``[in, 1]``,
low-rank or full; D and E are ``[out]`` or one number. C, D and E exist only where the layer has a bias, as in
PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from . import (
    MATRICES,
    METHODS,
    Array,
    Arrays,
    Dense,
    Method,
    NoBranch,
    NormalForm,
    Params,
    PeftContent,
    PeftKeys,
    PositiveInt,
    Random,
    Shape,
    Shapes,
    Site,
    Storage,
    Traits,
    Widths,
    array_namespace,
)

_PATHS = {"A": "config_A_B", "B": "config_A_B", "C": "config_C", "D": "config_D_E", "E": "config_D_E"}
"""Path (a term of the formula) -> the config field that selects its form."""


@dataclass(frozen=True, kw_only=True)
class GLoRA(NoBranch):
    """The rank, and the form of each path, under PEFT's names: ``lora``, ``vector``, ``constant`` or
    ``none``.

    ``biased`` says whether a site has a bias; it follows from the layer. ``unbiased`` lists the sites without
    one in a PEFT file, which only the tensors show.

    Example:
        >>> GLoRA(r=4, config_C="vector").config_A_B
        'lora'
    """

    r: PositiveInt = 8
    config_A_B: Literal["lora", "vector", "constant"] = "lora"  # noqa: N815 - PEFT's name
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815
    biased: bool | None = None
    unbiased: tuple[str, ...] | None = None

    def at(self, path: str) -> Self:
        """Returns the config for one site."""
        return (
            self if self.unbiased is None else replace(self, biased=path not in self.unbiased, unbiased=None)
        )


def _shapes(cfg: GLoRA, site: Site) -> Shapes:
    out, wide = site.out_features, site.in_features
    every = {"A": (out, wide), "B": (out, wide), "C": (wide, 1), "D": (out,), "E": (out,)}
    shapes_by_name: dict[str, Shape] = {}
    for path, shape in every.items():
        form = getattr(cfg, _PATHS[path])
        if form == "none" or (path in "CDE" and not (site.bias if cfg.biased is None else cfg.biased)):
            continue
        if form == "lora":
            shapes_by_name |= {f"glora_{path}_Xd": (shape[0], cfg.r), f"glora_{path}_Xu": (cfg.r, shape[1])}
        else:
            shapes_by_name[f"glora_{path}_X"] = (
                (1,) if form == "constant" else (*shape[:1], 1) if path in "ABC" else shape
            )
    return shapes_by_name


def _init(cfg: GLoRA, site: Site, rng: Random) -> Arrays:
    """Starts everything at zero except ``Xu``, which is Kaiming uniform with ``a = sqrt(5)``."""
    shapes = _shapes(cfg, site)
    return {
        name: rng.uniform(-1, 1, shape).astype(np.float32) * np.float32(shape[1] ** -0.5)
        if name.endswith("Xu")
        else np.zeros(shape, np.float32)
        for name, shape in shapes.items()
    }


def _path(params: Params, path: str) -> Array | None:
    """Returns one path as a matrix or an array that broadcasts to it; None if the site does not have it."""
    if f"glora_{path}_Xd" in params:
        return params[f"glora_{path}_Xd"] @ params[f"glora_{path}_Xu"]
    return params.get(f"glora_{path}_X")


def _normal_form(cfg: GLoRA, params: Params, site: Site) -> NormalForm:
    A, B, C, D, E = (_path(params, path) for path in _PATHS)
    W, b = site.weight, site.base_bias
    assert W is not None
    change = W * A + B
    shift = None if E is None else E + (0 if b is None else b * D)
    if C is not None:
        fed = (W @ C)[:, 0]
        shift = fed if shift is None else shift + fed
    # D and E may be single numbers; the shift needs one value per output.
    if shift is not None and shift.shape[0] != W.shape[0]:
        xp = array_namespace(W)
        shift = shift + xp.zeros(W.shape[0], dtype=shift.dtype, device=shift.device)
    return NormalForm(down=Dense(change), shift=shift)


_KEYS = PeftKeys(GLoRA, ("r", "config_A_B", "config_C", "config_D_E"), {"init_weights": True, "bias": "none"})


def _from_peft_file(content: PeftContent) -> PeftContent:
    """Drops the zeros that PEFT stores for missing paths; a site that then has nothing of C, D and E has no
    bias.
    """
    kept = content.change_sites(
        lambda params: {name: value for name, value in params.items() if not name.startswith("zeros_")}
    )
    return kept.configure(
        unbiased=tuple(
            path for path, params in kept.sites.items() if not any(name[6] in "CDE" for name in params)
        )
    )


def _features(params: Params) -> Widths:
    if "glora_A_Xd" in params:
        return params["glora_A_Xu"].shape[1], params["glora_A_Xd"].shape[0]
    return None, params["glora_A_X"].shape[0] if params["glora_A_X"].ndim == 2 else None


glora = METHODS.register(
    Method(
        name="glora",
        summary="the weight scaled and moved, the bias scaled, moved and fed by the weight",
        paper="https://arxiv.org/abs/2306.07967",
        formula="W' = W + W * A + B,  b' = b + b * D + E + W C",
        config=GLoRA,
        traits=Traits(reads_weight=True, layers=MATRICES),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            GLoRA(r=2),
            GLoRA(r=3, config_C="vector", config_D_E="vector"),
            GLoRA(config_A_B="vector", config_C="none"),
            GLoRA(r=1, config_A_B="constant", config_D_E="none"),
        ),
        storage=Storage(
            resolve=lambda configs, sites: [
                replace(cfg, biased=site.bias) if cfg.biased is None else cfg
                for cfg, site in zip(configs, sites, strict=True)
            ]
        ),
        peft=_KEYS.form(
            peft_type="GLORA",
            suffixes={
                f"glora_{path}_{leaf}": f"glora_{path}.{leaf}"
                for path in _PATHS
                for leaf in ("Xd", "Xu", "X")
            },
            features=_features,
            aliases={f"glora_{path}.zeros": f"zeros_{path}" for path in _PATHS},
            from_peft_file=_from_peft_file,
        ),
    )
)
