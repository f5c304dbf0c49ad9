"""RoAd: rotates and scales the outputs of a layer in pairs (Liao and Monz 2024, arXiv 2409.00119, section
3.2).

    y' = c * y + s * turned(y),   y = W x + b,   c = alpha cos theta,   s = alpha sin theta

In a group of g outputs, i and i + g/2 form a pair (y_i, y_j), and turned gives (-y_j, y_i). ``road_theta``
and ``road_alpha`` hold one number for each pair (``road_1``), one for each output (``road_2``), or two for
each output, one for c and one for s (``road_4``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta

from . import (
    METHODS,
    WIDEST,
    Array,
    Method,
    NoBranch,
    NormalForm,
    PairRotation,
    Params,
    PeftKeys,
    Shapes,
    Site,
    Traits,
    array_namespace,
    zeros,
)
from .core.orthogonal import nearest_divisor


class _Variant(NamedTuple):
    """``numbers``: how many values of each parameter a pair of outputs has. ``spread`` expands a parameter to
    one value for each output, ``[out]``, for c (side 0) or for s (side 1).
    """

    numbers: int
    spread: Callable[[Array, int, int], Array]


def _same(values: Array, half: int, side: int) -> Array:
    xp = array_namespace(values)
    groups = xp.reshape(values, (-1, 1, half))
    return xp.reshape(xp.concat([groups, groups], axis=1), (-1,))


def _apart(values: Array, half: int, side: int) -> Array:
    xp = array_namespace(values)
    return xp.reshape(xp.reshape(values, (-1, 2, 2 * half))[:, side, :], (-1,))


VARIANTS = {
    "road_1": _Variant(1, _same),
    "road_2": _Variant(2, lambda values, half, side: values),
    "road_4": _Variant(4, _apart),
}


@dataclass(frozen=True)
class RoAd(NoBranch):
    """The hyper-parameters of RoAd.

    If the group size does not divide a layer's outputs, the nearest even divisor replaces it. The last of an
    odd number of outputs is paired with a zero, so that it is only scaled.

    Example:
        >>> RoAd(variant="road_2", group_size=32).scale
        1.0
    """

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Annotated[int, Meta(ge=2, le=WIDEST)] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise ValueError(f"group_size must be even, not {self.group_size!r}")


def _shapes(cfg: RoAd, site: Site) -> Shapes:
    count = (site.out_features + 1) // 2 * VARIANTS[cfg.variant].numbers
    return {"road_theta": (count,), "road_alpha": (count,)}


def _normal_form(cfg: RoAd, params: Params, site: Site) -> NormalForm:
    theta, alpha = params["road_theta"], params["road_alpha"]
    xp = array_namespace(theta)
    half = nearest_divisor((site.out_features + 1) // 2, cfg.group_size // 2)
    spread = VARIANTS[cfg.variant].spread
    cosines = spread(alpha * xp.cos(theta), half, 0)
    sines = spread(alpha * xp.sin(theta), half, 1)
    return NormalForm(post=PairRotation(cosines, sines, half, site.out_features))


_KEYS = PeftKeys(RoAd, ("variant", "group_size"), {"init_weights": True})

road = METHODS.register(
    Method(
        name="road",
        summary="a layer's outputs turned and scaled in pairs",
        paper="https://arxiv.org/abs/2409.00119",
        formula="y' = alpha cos(theta) * y + alpha sin(theta) * turned(y)",
        config=RoAd,
        traits=Traits(row_separable=False, min_features=(2, 1)),
        shapes=_shapes,
        init=zeros(_shapes, road_alpha=1),
        normal_form=_normal_form,
        examples=(
            RoAd(),
            RoAd(variant="road_2", group_size=4),
            RoAd(variant="road_4", group_size=6),
            RoAd(group_size=2),
        ),
        peft=_KEYS.form(
            peft_supports=lambda cfg, site: site.out_features % cfg.group_size == 0,
            peft_type="ROAD",
            suffixes=("road_theta", "road_alpha"),
        ),
    )
)
