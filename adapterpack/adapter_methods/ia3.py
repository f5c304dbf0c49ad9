"""(IA)^3: trained factors on the outputs of a layer, or on the inputs of a feedforward layer (Liu et al.
2022, arXiv 2205.05638, section 3.3).

    y' = l * (W x + b)        at a feedforward layer:  y' = W (l * x) + b

The factors l have shape [out, 1], or [1, in] at a feedforward layer. At a feedforward convolution PEFT has
one factor for each input channel, for all points of the kernel.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import Unsupported, excerpt
from . import (
    CONVOLUTIONS,
    METHODS,
    OPTIONAL,
    TRANSPOSED,
    Arrays,
    Diagonal,
    Method,
    NoBranch,
    NormalForm,
    Params,
    PeftConfig,
    PeftContent,
    PeftForm,
    PeftLayer,
    Shapes,
    Site,
    SiteConfigs,
    Traits,
    Widths,
    array_namespace,
    by_suffix,
    has_axes,
    require_whole,
    zeros,
)


@dataclass(frozen=True)
class IA3(NoBranch):
    """Where (IA)^3 goes; ``feedforward`` names the sites whose inputs are scaled, or says it of all (true) or
    none.

    ``channels`` is the number of channels of a feedforward convolution with one factor for all points of a
    channel's kernel; with 0 each point has its own factor.

    Example:
        >>> IA3(feedforward=("fc2",)).at("layers.0.fc2").feedforward
        True
    """

    feedforward: tuple[str, ...] | bool = ()
    channels: Any = field(default=0, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.feedforward, tuple | bool):
            raise ValueError(f"feedforward must be true, false or a tuple of names, not {self.feedforward!r}")
        for count in self.channels.values() if isinstance(self.channels, Mapping) else [self.channels]:
            require_whole("channels", count, 0)

    def at(self, path: str) -> IA3:
        """Returns the config for one site: ``feedforward`` becomes a bool, decided by the literal path or its
        last components.
        """
        if isinstance(self.feedforward, bool) and not isinstance(self.channels, Mapping):
            return self
        channels = by_suffix(self.channels, path, 0) if isinstance(self.channels, Mapping) else self.channels
        inner = (
            self.feedforward if isinstance(self.feedforward, bool) else by_suffix(self._named, path, False)
        )
        return replace(self, feedforward=inner, channels=channels)

    @cached_property
    def _named(self) -> dict[str, bool]:
        return {} if isinstance(self.feedforward, bool) else dict.fromkeys(self.feedforward, True)


def _shapes(cfg: IA3, site: Site) -> Shapes:
    return {"ia3_l": (1, cfg.channels or site.in_features) if cfg.feedforward else (site.out_features, 1)}


def _normal_form(cfg: IA3, params: Params, site: Site) -> NormalForm:
    factors = params["ia3_l"]
    if not cfg.feedforward:
        return NormalForm(output_scale=factors[:, 0])
    xp = array_namespace(factors)
    count = factors.shape[1]
    points = xp.broadcast_to(factors[0, :, None], (count, site.in_features // count))
    return NormalForm(pre=Diagonal(xp.reshape(points, (site.in_features,))))


def _combine(terms: Sequence[tuple[Params, float]]) -> Arrays:
    """Computes ``l = 1 + sum_i w_i (l_i - 1)``: a change of (IA)^3 is linear in ``l - 1``, on inputs and on
    outputs.
    """
    total = 1 + sum(weight * (np.asarray(params["ia3_l"], np.float64) - 1) for params, weight in terms)
    return {"ia3_l": np.asarray(total, np.float32)}


def _to_peft(sites: SiteConfigs) -> PeftConfig:
    inner = [path for path, cfg in sites.items() if cfg.feedforward]
    # PEFT matches a name in this list with the end of a path, even in the middle of a word, but matches a
    # string as a regular expression against the full path.
    # Reversed paths turn "ends with" into "begins with", which a sorted list answers by bisection.
    backwards = sorted(path[::-1] for path, cfg in sites.items() if not cfg.feedforward)
    # the first reversed path that could begin with this one
    first = ((path[::-1], bisect_left(backwards, path[::-1])) for path in inner)
    clash = any(at < len(backwards) and backwards[at].startswith(path) for path, at in first)
    return {
        "feedforward_modules": "|".join(map(re.escape, inner)) if clash else inner,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }


def _from_peft(config: PeftConfig) -> IA3:
    modules = config.get("feedforward_modules") or ()
    names = (
        [name.replace("\\", "") for name in modules.split("|")] if isinstance(modules, str) else list(modules)
    )
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise Unsupported(
                "this PEFT pattern is a regular expression, which is not run",
                where="feedforward_modules",
                expected="module names",
                found=excerpt(modules),
                remedy="write the pattern with literal module names",
            )
    anchor = "^" if isinstance(modules, str) else ""
    return IA3(feedforward=tuple(anchor + name for name in names))


def _features(params: Params) -> Widths:
    rows, columns = params["ia3_l"].shape
    return (columns if columns > 1 else None, rows if rows > 1 else None)


def _as_kernel(cfg: IA3, site: Site, params: Params) -> Arrays:
    """PEFT stores the factors along the second axis of a convolution's output or input; the number of axes
    shows the dimensions of the kernel.
    """
    factors = params["ia3_l"]
    return {"ia3_l": factors.reshape(1, -1, *(1,) * len(site.kernel))}


def _uncertain(cfg: IA3, site: Site) -> str:
    if not cfg.feedforward or (
        cfg.channels and (not site.kernel or cfg.channels * math.prod(site.kernel) == site.in_features)
    ):
        return ""
    return (
        "a factor for each channel that a convolution of groups reads is no change of its weight, which has "
        "those of one group"
    )


def _channels(content: PeftContent) -> PeftContent:
    """Reads the number of channels at feedforward convolutions, which only the tensors show."""
    count = {
        f"^{path}": tensors["ia3_l"].shape[1]
        for path, tensors in content.sites.items()
        if tensors.get("ia3_l", np.zeros(0)).ndim > 2 and content.config.at(path).feedforward
    }
    return content.configure(channels=count) if count else content


_CONVOLUTION = PeftLayer(
    shapes_say_so=has_axes(4, 5),
    stored=_as_kernel,
    loaded=lambda cfg, params: {"ia3_l": params["ia3_l"].reshape((1, -1) if cfg.feedforward else (-1, 1))},
    ambiguous_because=_uncertain,
)

ia3 = METHODS.register(
    Method(
        name="ia3",
        summary="a learned factor on every output of a layer, or on every input of a feedforward layer",
        paper="https://arxiv.org/abs/2205.05638",
        formula="y' = l * (W x + b), or W (l * x) + b in feedforward layers",
        config=IA3,
        traits=Traits(),
        shapes=_shapes,
        init=zeros(_shapes, ia3_l=1),
        normal_form=_normal_form,
        examples=(IA3(), IA3(feedforward=True), IA3(feedforward=("other", "0.proj"))),
        overrides={"linear_combination": _combine},
        peft=PeftForm(
            peft_type="IA3",
            suffixes={"ia3_l": "ia3_l"},
            layers={"conv": _CONVOLUTION, "grouped_conv": _CONVOLUTION, **TRANSPOSED},
            from_peft_file=_channels,
            to_config=_to_peft,
            from_config=_from_peft,
            features=_features,
            overrides={
                "features": lambda kind, params: (
                    None if kind in CONVOLUTIONS else _features(params)[0],
                    _features(params)[1],
                )
            },
        ),
    )
)
