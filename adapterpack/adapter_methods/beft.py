"""Trained biases: BitFit (Ben Zaken et al. 2022, arXiv 2106.10199, section 3), which PEFT calls BEFT.

    y' = base(x) + beta

``beft_bias`` ``[1, out]`` is the change of the bias, so that an adapter can be removed again. A layer without
a bias gets one; merging such an adapter is refused, because the base's files have no place for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import METHODS, Method, NoBranch, NormalForm, PeftForm, Shapes, Site, Traits, zeros


@dataclass(frozen=True)
class BEFT(NoBranch):
    """Where biases are trained; there is nothing else to choose.

    Example:
        >>> BEFT(targets=("q_proj", "v_proj")).scale
        1.0
    """


def _shapes(cfg: BEFT, site: Site) -> Shapes:
    return {"beft_bias": (1, site.out_features)}


beft = METHODS.register(
    Method(
        name="beft",
        summary="a trained change of a layer's bias, as in BitFit",
        paper="https://arxiv.org/abs/2106.10199",
        formula="y' = W x + b + beta",
        config=BEFT,
        traits=Traits(additive=True),
        shapes=_shapes,
        init=zeros(_shapes),
        normal_form=lambda cfg, params, site: NormalForm(shift=params["beft_bias"][0, :]),
        examples=(BEFT(), BEFT(targets=("proj",))),
        peft=PeftForm(
            # PEFT loads such an adapter at a layer without a bias but cannot merge it
            peft_supports=lambda cfg, site: site.bias,
            peft_type="BEFT",
            suffixes={"beft_bias": "beft_bias"},
            to_config=lambda sites: {"init_weights": True},
            from_config=lambda config: BEFT(),
            features=lambda params: (None, params["beft_bias"].shape[1]),
        ),
    )
)
