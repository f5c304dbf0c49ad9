"""P-tuning: embeddings before the first token, computed by a small network (Liu et al. 2021, arXiv
2103.10385, section 3.2).

    P = f(E),   E [n, in]
    f: three linear layers with ReLU between, or a bidirectional LSTM and two linear layers

Only the result P is packed: the network is needed only for training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from . import (
    METHODS,
    Array,
    Arrays,
    Method,
    NonNegativeInt,
    Params,
    PeftConfig,
    PromptForm,
    Random,
    Shape,
    Shapes,
    Site,
    Storage,
    array_namespace,
    normal,
)
from .forms.blocks import relu
from .forms.prompt import STORED, EmbeddingConfig, embedding_fields, linear, peft_form, traits, uniform

_MOST_LAYERS = 64
"""The most LSTM layers: configs come from untrusted files, and each layer costs computation."""


@dataclass(frozen=True, kw_only=True)
class PTuning(EmbeddingConfig):
    """``encoder``: ``mlp`` or ``lstm`` of ``encoder_layers``; ``encoder_hidden`` is its width (0: the model's
    own).

    ``baked`` means that the network was dropped and the embeddings themselves are stored.

    Example:
        >>> PTuning(num_virtual_tokens=8, encoder="lstm").encoder_layers
        2
    """

    encoder: Literal["mlp", "lstm"] = "mlp"
    encoder_hidden: NonNegativeInt = 0
    encoder_layers: Annotated[int, Meta(ge=1, le=_MOST_LAYERS)] = 2
    baked: bool = False


def _layers(cfg: PTuning, site: Site) -> dict[str, tuple[Shape, int]]:
    """Returns parameter of the network -> its shape and its fan-in as torch defines it."""
    width = site.in_features
    hidden = cfg.encoder_hidden or site.in_features
    layers: dict[str, tuple[Shape, int]] = {}
    if cfg.encoder == "lstm":
        for layer in range(cfg.encoder_layers):
            entering = width if layer == 0 else 2 * hidden
            for side in ("", "_reverse"):
                for kind, shape in (
                    ("weight_ih", (4 * hidden, entering)),
                    ("weight_hh", (4 * hidden, hidden)),
                    ("bias_ih", (4 * hidden,)),
                    ("bias_hh", (4 * hidden,)),
                ):
                    layers[f"lstm_{kind}_l{layer}{side}"] = shape, hidden
        sizes = [(2 * hidden, 2 * hidden), (width, 2 * hidden)]
    else:
        sizes = [(hidden, width), (hidden, hidden), (width, hidden)]
    for number, (wide, narrow) in enumerate(sizes):
        layers |= {f"mlp_{number}_weight": ((wide, narrow), narrow), f"mlp_{number}_bias": ((wide,), narrow)}
    return layers


def _shapes(cfg: PTuning, site: Site) -> Shapes:
    network = {} if cfg.baked else {name: shape for name, (shape, _) in _layers(cfg, site).items()}
    return {STORED: (cfg.num_virtual_tokens, site.in_features), **network}


def _init(cfg: PTuning, site: Site, rng: Random) -> Arrays:
    start = normal(rng, (cfg.num_virtual_tokens, site.in_features), 1)
    return {
        STORED: start,
        **{name: uniform(rng, fan_in, shape) for name, (shape, fan_in) in _layers(cfg, site).items()},
    }


def _normal_form(cfg: PTuning, params: Params, site: Site) -> PromptForm:
    x = params[STORED]
    if cfg.baked:
        return PromptForm(embeds=x)
    for layer in range(cfg.encoder_layers if cfg.encoder == "lstm" else 0):
        x = _both_ways(x, params, f"_l{layer}")
    count = 2 if cfg.encoder == "lstm" else 3
    for number in range(count):
        x = linear(x if number == 0 else relu(x), params, f"mlp_{number}")
    return PromptForm(embeds=x)


def _both_ways(x: Array, params: Params, layer: str) -> Array:
    """Computes one bidirectional LSTM layer, both directions at once, with gates in torch's order i, f, g, o:
    ``[n, in]`` to ``[n, 2 hidden]``.
    """
    xp = array_namespace(x)

    def both(kind: str) -> Array:
        return xp.stack([params[f"lstm_{kind}{layer}{side}"] for side in ("", "_reverse")])

    turn = both("weight_hh")
    bias = both("bias_ih") + both("bias_hh")
    hidden = turn.shape[2]
    ones = xp.ones_like(bias[0, :hidden])
    # sigmoid(z) = tanh(z / 2) / 2 + 1 / 2: one tanh serves all gates
    part = xp.concat([0.5 * ones, 0.5 * ones, ones, 0.5 * ones])
    # The backward direction is the forward one on the reversed sequence, so both run as one batch of two.
    ways = xp.stack([x, xp.flip(x, axis=0)])
    entering = part * (ways @ xp.matrix_transpose(both("weight_ih")) + bias[:, None, :])
    turn = part[:, None] * turn
    h = c = xp.zeros_like(entering[:, 0, :hidden])
    outputs = []
    for step in range(x.shape[0]):
        gates = part * xp.tanh(entering[:, step, :] + (turn @ h[:, :, None])[:, :, 0]) + (1 - part)
        i, f, g, o = (gates[:, number * hidden : (number + 1) * hidden] for number in range(4))
        c = f * c + i * g
        h = o * xp.tanh(c)
        outputs.append(h)
    states = xp.stack(outputs, axis=1)
    return xp.concat([states[0, ...], xp.flip(states[1, ...], axis=0)], axis=1)


def _from_peft(config: PeftConfig) -> PTuning:
    encoder: Any = str(config.get("encoder_reparameterization_type") or "MLP").lower()
    return PTuning(
        **embedding_fields(config),
        encoder=encoder,
        encoder_hidden=config.get("encoder_hidden_size") or 0,
        encoder_layers=config.get("encoder_num_layers") or 2,
        baked=True,
    )


p_tuning = METHODS.register(
    Method(
        name="p_tuning",
        summary=(
            "embeddings before the first token, trained through an MLP or an LSTM that is gone afterwards"
        ),
        paper="https://arxiv.org/abs/2103.10385",
        formula="P = f(E) before the first token,  f an MLP or an LSTM",
        kind="prompt",
        config=PTuning,
        traits=traits(),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            PTuning(num_virtual_tokens=3),
            PTuning(num_virtual_tokens=4, encoder_hidden=5),
            PTuning(num_virtual_tokens=3, encoder="lstm", encoder_hidden=5),
        ),
        storage=Storage(
            to_stored=lambda cfg, params, site: (
                replace(cfg, baked=True),
                {STORED: np.asarray(_normal_form(cfg, params, site).embeds, np.float32)},
            )
        ),
        peft=peft_form(
            "P_TUNING",
            lambda cfg: {
                "encoder_reparameterization_type": cfg.encoder.upper(),
                "encoder_hidden_size": cfg.encoder_hidden or None,
                "encoder_num_layers": cfg.encoder_layers,
                "encoder_dropout": 0.0,
            },
            _from_peft,
            parts=True,
        ),
    )
)
