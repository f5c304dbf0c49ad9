"""LN tuning: trains the weights and biases of the normalisation layers (Zhao et al. 2023, arXiv 2312.11420,
section 3).

    y' = w' * n(x) + b'   in place of   y = w * n(x) + b

n is what the layer computes before it applies its weight. For a method the layer is therefore linear with one
input n(x) for every output, and its weight is a column [n, 1]. ``weight`` [n] and ``bias`` [n] (if there is
one) are the new values themselves, as in PEFT, and start as the base's. As in PEFT, a linear layer among the
targets is trained in the same way; its ``weight`` is [out, in].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import (
    METHODS,
    Array,
    Arrays,
    Dense,
    Method,
    NoBranch,
    NormalForm,
    Params,
    PeftForm,
    PeftLayer,
    Random,
    Shapes,
    Site,
    Traits,
)


@dataclass(frozen=True, kw_only=True)
class LNTuning(NoBranch):
    """Which normalisation layers are trained; there is nothing else to choose.

    Example:
        >>> LNTuning().targets
        'all-norm'
    """

    targets: str | tuple[str, ...] = "all-norm"


def _shapes(cfg: LNTuning, site: Site) -> Shapes:
    weight = (site.out_features,) if site.kind == "norm" else (site.out_features, site.in_features)
    return {"weight": weight, **({"bias": weight[:1]} if site.bias else {})}


def _init(cfg: LNTuning, site: Site, rng: Random) -> Arrays:
    weight = {"weight": np.reshape(np.array(site.weight), _shapes(cfg, site)["weight"])}
    return {**weight, "bias": np.array(site.base_bias)} if site.bias else weight


def _normal_form(cfg: LNTuning, params: Params, site: Site) -> NormalForm:
    down = Dense(_matrix(params["weight"]) - site.weight)
    return NormalForm(down=down, shift=params["bias"] - site.base_bias if site.bias else None)


def _matrix(weight: Array) -> Array:
    """Returns the weight as the method's matrix; a norm's vector becomes a column."""
    return weight[:, None] if len(weight.shape) == 1 else weight


ln_tuning = METHODS.register(
    Method(
        name="ln_tuning",
        summary="the weights and biases of normalisation layers, trained themselves",
        paper="https://arxiv.org/abs/2312.11420",
        formula="y' = w' * n(x) + b'",
        config=LNTuning,
        traits=Traits(
            exclusive=True, reads_weight=True, quantizable=False, batchable=False, layers=("norm", "linear")
        ),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        overrides={
            "fold": lambda cfg, params, site, weight, bias, rows: (
                _matrix(params["weight"][rows]),
                params["bias"][rows] if site.bias else bias,
            )
        },
        examples=(LNTuning(), LNTuning(targets=("proj",))),
        peft=PeftForm(
            peft_type="LN_TUNING",
            suffixes={"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"},
            to_config=lambda sites: {},
            from_config=lambda config: LNTuning(),
            features=lambda params: (
                1 if params["weight"].ndim == 1 else params["weight"].shape[1],
                params["weight"].shape[0],
            ),
            layers={
                "linear": PeftLayer(
                    shapes_say_so=lambda shapes: any(len(shape) == 2 for shape in shapes.values())
                ),
                "transposed": PeftLayer(
                    config={"fan_in_fan_out": True},
                    ambiguous_because=lambda cfg, site: (
                        "PEFT stores the weight of such a layer as it is, and does not say that it is the "
                        "other way round"
                    ),
                ),
            },
        ),
    )
)
