"""Bottleneck adapters: a narrow layer with an activation, after a block or parallel to it.

    h' = h + s (W_up act(W_down norm(z) + b_down) + b_up),   z = h, or the block's input

Houlsby et al. 2019 (arXiv 1902.00751, section 2.1), Pfeiffer et al. 2020 (arXiv 2005.00052, section 3.1), and
in parallel, He et al. 2021 (arXiv 2110.04366, table 1). W_down ``[r, width]`` is Kaiming uniform; W_up
``[width, r]`` and the biases start at zero, so that a fresh adapter changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from . import METHODS, BlockConfig, BlockForm, Dense, Method, Shapes, Site, kaiming, zeros
from .forms.blocks import TRAITS, Norm


@dataclass(frozen=True, kw_only=True)
class Bottleneck(BlockConfig):
    """The hyper-parameters of a bottleneck adapter; the defaults are Pfeiffer's. ``norm`` normalizes what the
    branch reads.

    Example:
        >>> Bottleneck.houlsby().act, Bottleneck.parallel(reduction=8).reduction
        ('silu', 8)
    """

    norm: bool = False
    bias: bool = True

    @classmethod
    def houlsby(cls, **changes: Any) -> Self:
        """Returns Houlsby's config: after attention and after the feed-forward, before the residual and the
        norm; swish, reduction 16.
        """
        return cls(**{"targets": "all-blocks", "act": "silu", "reduction": 16, **changes})

    @classmethod
    def pfeiffer(cls, **changes: Any) -> Self:
        """Returns Pfeiffer's config: once per layer, on the residual stream after the feed-forward; relu,
        reduction 16.
        """
        return cls(**{"targets": "all-layers", "act": "relu", "reduction": 16, **changes})

    @classmethod
    def parallel(cls, **changes: Any) -> Self:
        """Returns the parallel config: next to the feed-forward, from its input to its output; relu,
        reduction 2, scale 4.
        """
        return cls(
            **{
                "targets": "all-ffn",
                "source": "input",
                "act": "relu",
                "reduction": 2,
                "scaling": 4.0,
                **changes,
            }
        )


def _shapes(cfg: Bottleneck, site: Site) -> Shapes:
    r = cfg.width(site)
    n = site.out_features
    biases = {"down_bias": (r,), "up_bias": (n,)} if cfg.bias else {}
    return {
        "down": (r, n),
        "up": (n, r),
        **biases,
        **({"norm_weight": (n,), "norm_bias": (n,)} if cfg.norm else {}),
    }


bottleneck = METHODS.register(
    Method(
        name="bottleneck",
        summary="a narrow layer with an activation after a block (Houlsby, Pfeiffer) or parallel to it",
        paper="https://arxiv.org/abs/1902.00751",
        formula="h + scaling (up act(down norm(z)) + b), z = h or x",
        kind="activation",
        config=Bottleneck,
        traits=TRAITS,
        shapes=_shapes,
        init=zeros(_shapes, down=kaiming, norm_weight=1),
        normal_form=lambda cfg, params, site: BlockForm(
            down=Dense(params["down"]),
            up=Dense(cfg.scale * params["up"]),
            down_bias=params["down_bias"] if cfg.bias else None,
            up_bias=cfg.scale * params["up_bias"] if cfg.bias else None,
            act=cfg.act,
            norm=Norm(params["norm_weight"], params["norm_bias"]) if cfg.norm else None,
            reads_input=cfg.reads_input,
        ),
        examples=(
            Bottleneck.houlsby(reduction=2),
            Bottleneck.pfeiffer(reduction=3, bias=False),
            Bottleneck.parallel(),
            Bottleneck(act="gelu", norm=True, reduction=4, scaling=0.5),
            Bottleneck(act="gelu_tanh", source="input", norm=True, bias=False, reduction=1, dropout=0.1),
            Bottleneck(act="tanh", reduction=2),
        ),
    )
)
