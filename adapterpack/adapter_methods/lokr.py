"""LoKr: a change that is a Kronecker product (Edalati et al. 2022, KronA, arXiv 2212.10650; LyCORIS, arXiv
2309.14859).

    W' = W + s kron(w1, w2),   s = alpha / r

w1 is ``[a, b]`` and w2 ``[out / a, in / b]``; a and b divide the widths and are close to
``decompose_factor``, or to the square roots of the widths if it is -1. A factor that becomes smaller that way
is stored as a product ``w_a w_b`` of rank r: w2, and w1 with ``decompose_both``. At a convolution PEFT
divides only the input channels, and w2 contains the entire kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import (
    MATRICES,
    METHODS,
    OPTIONAL,
    AlphaConfig,
    Array,
    Arrays,
    Kronecker,
    Method,
    NonNegativeInt,
    NormalForm,
    Params,
    PeftConfig,
    PeftContent,
    PeftKeys,
    PeftLayer,
    Shapes,
    Site,
    Tensors,
    Traits,
    array_namespace,
    kaiming,
    pattern_of,
    refuse_site,
    require_whole,
    shapes_of,
    zeros,
)
from .loha import CONSTANTS, FIELDS, with_kernel


@dataclass(frozen=True)
class LoKr(AlphaConfig):
    """The hyper-parameters of LoKr; ``alpha`` defaults to ``2 r``.

    ``kernel`` is the number of points of a convolution's kernel, all of which w2 contains, and may differ by
    site; with 0 the unfolded kernel is divided like any matrix.

    Example:
        >>> LoKr(r=4, alpha=4).scale
        1.0
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    kernel: NonNegativeInt = field(default=0, metadata=OPTIONAL)
    kernel_pattern: Mapping[str, int] = pattern_of("kernel")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1:
            require_whole("decompose_factor", self.decompose_factor)


def split_width(width: int, factor: int) -> tuple[int, int]:
    """Splits ``width`` into a product of two numbers, the smaller first (unless it is ``factor`` itself): the
    largest divisor up to ``factor``, or up to the square root if ``factor`` is -1.

    Example:
        >>> split_width(128, -1), split_width(128, 4), split_width(128, 64), split_width(127, -1)
        ((8, 16), (4, 32), (64, 2), (1, 127))
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = width if factor == -1 else factor
    small = max((n for n in range(1, int(width**0.5) + 1) if width % n == 0 and n <= most), default=1)
    return small, width // small


def _shapes(cfg: LoKr, site: Site) -> Shapes:
    points = cfg.kernel or 1
    (b, d), (a, c) = (
        split_width(site.in_features // points, cfg.decompose_factor),
        split_width(site.out_features, cfg.decompose_factor),
    )
    split1 = cfg.decompose_both and 2 * cfg.r < max(a, b)
    split2 = 2 * cfg.r < max(c, d)
    d *= points
    first = {"lokr_w1_a": (a, cfg.r), "lokr_w1_b": (cfg.r, b)} if split1 else {"lokr_w1": (a, b)}
    second = {"lokr_w2_a": (c, cfg.r), "lokr_w2_b": (cfg.r, d)} if split2 else {"lokr_w2": (c, d)}
    return {**first, **second}


def _factor(params: Params, name: str) -> Array:
    if name in params:
        return params[name]
    left, right = params[f"{name}_a"], params[f"{name}_b"]
    return array_namespace(left, right).matmul(left, right)


def _kernels(content: PeftContent) -> PeftContent:
    """Multiplies the kernels into w2 or its second factor, and reads the number of kernel points from the
    tensors; where they leave a choice, it makes no difference.
    """
    sites, points = {}, {}
    for path, tensors in content.sites.items():
        if _is_mixed_up(tensors):
            raise refuse_site(
                path,
                tensors,
                "PEFT multiplies out a whole w2 of a kernel of one axis with its axes mixed up, which is no "
                "Kronecker product",
            )
        sites[path] = _join(tensors) if "lokr_t2" in tensors else tensors
        count = _points(content.config.at(path), tensors, sites[path])
        if count:
            points[f"^{path}"] = count
    content = content._replace(sites=sites)
    return content.configure(kernel_pattern=points) if points else content


def _join(tensors: Tensors) -> Arrays:
    if not {"lokr_w2_a", "lokr_w2_b"} <= tensors.keys():
        raise ValueError(f"a kernel without its factors: {', '.join(sorted(tensors))}")
    rest = {name: value for name, value in tensors.items() if name != "lokr_t2"}
    return {
        **rest,
        "lokr_w2_a": np.ascontiguousarray(tensors["lokr_w2_a"].T),
        "lokr_w2_b": with_kernel(tensors["lokr_t2"], tensors["lokr_w2_b"]),
    }


def _points(cfg: LoKr, tensors: Tensors, joined: Tensors) -> int:
    """Returns how many kernel points the second factor contains; 0 if the tensors are those of a matrix."""
    shown = tensors.get("lokr_w2", tensors.get("lokr_t2"))
    if shown is not None:
        return math.prod(shown.shape[2:]) if shown.ndim > 2 else 0
    (_, b), (c, d) = _sides(joined, "lokr_w1"), _sides(joined, "lokr_w2")
    # Only the product of channels and points is known: take the smallest count that explains the stored
    # shapes.
    for points in range(1, min(d, _LARGEST) + 1):
        if (
            d % points == 0
            and 2 * cfg.r < max(c, d // points)
            and split_width(b * d // points, cfg.decompose_factor)[0] == b
        ):
            return points if points > 1 else 0
    return 0


_LARGEST = 1024
"""The most kernel points that are tried if only the product of channels and points is known."""


def _sides(params: Params, name: str) -> tuple[int, int]:
    """Returns the shape of a factor, stored as one matrix or as two."""
    whole = params.get(name)
    shape = (params[f"{name}_a"].shape[0], params[f"{name}_b"].shape[1]) if whole is None else whole.shape
    return shape[0], shape[1]


def _features(params: Params) -> tuple[int, int]:
    (a, b), (c, d) = _sides(params, "lokr_w1"), _sides(params, "lokr_w2")
    return b * d, a * c


def _as_kernel(cfg: LoKr, site: Site, params: Params) -> Arrays:
    """PEFT stores an undivided w2 with the kernel's axes."""
    w2 = params.get("lokr_w2")
    return (
        dict(params)
        if w2 is None or not cfg.kernel or not site.kernel
        else {**params, "lokr_w2": w2.reshape(len(w2), -1, *site.kernel)}
    )


def _is_mixed_up(tensors: Params) -> bool:
    """Whether PEFT multiplies a site's factors with their axes in the wrong order: w2 has a one-dimensional
    kernel, and neither factor is trivial.
    """
    shapes = shapes_of(tensors)
    w2 = shapes.get("lokr_w2", ())
    a, b = shapes.get("lokr_w1") or (shapes.get("lokr_w1_a", (0,))[0], shapes.get("lokr_w1_b", (0,))[-1])
    return len(w2) == 3 and not (1 in {a, w2[0]} and 1 in {b, w2[1]})


_CONVOLUTION = PeftLayer(
    shapes_say_so=lambda shapes: len(shapes["lokr_w2"]) > 2 if "lokr_w2" in shapes else None,
    stored=_as_kernel,
    ambiguous_because=lambda cfg, site: (
        "" if cfg.kernel or site.kernel else "PEFT divides the channels of a convolution alone"
    ),
)


_KEYS = PeftKeys(
    LoKr,
    {**FIELDS, "decompose_both": False, "decompose_factor": -1},
    {**CONSTANTS, "rank_dropout_scale": False},
    whole=("alpha",),
)


def _from_peft(config: PeftConfig) -> Any:
    """Reads PEFT's keys. PEFT before 0.14, which wrote no ``rank_dropout_scale``, never applied alpha."""
    if "rank_dropout" in config and "rank_dropout_scale" not in config:
        config = {**config, "alpha": config.get("r", 8), "alpha_pattern": config.get("rank_pattern")}
    return _KEYS.from_config(config)


lokr = METHODS.register(
    Method(
        name="lokr",
        summary="a change that is the Kronecker product of two small matrices",
        paper="https://arxiv.org/abs/2309.14859",
        formula="W' = W + s kron(w1, w2)",
        config=LoKr,
        traits=Traits(additive=True, layers=MATRICES),
        shapes=_shapes,
        init=zeros(_shapes, lokr_w1_b=kaiming, lokr_w2=kaiming, lokr_w2_a=kaiming, lokr_w2_b=kaiming),
        normal_form=lambda cfg, params, site: NormalForm(
            down=Kronecker(cfg.scale * _factor(params, "lokr_w1"), _factor(params, "lokr_w2"))
        ),
        examples=(
            LoKr(r=8),
            LoKr(r=1, alpha=3),
            LoKr(r=1, alpha=2, decompose_both=True, decompose_factor=4),
            LoKr(r=2, decompose_factor=3),
        ),
        peft=_KEYS.form(
            peft_type="LOKR",
            suffixes=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
            features=_features,
            aliases={"lokr_t2": "lokr_t2"},
            from_config=_from_peft,
            from_peft_file=_kernels,
            layers={"conv": _CONVOLUTION, "grouped_conv": _CONVOLUTION},
        ),
    )
)
