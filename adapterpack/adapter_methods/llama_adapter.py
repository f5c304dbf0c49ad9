"""LLaMA-Adapter: prompts that the last layers attend to, through gates that start at zero (Zhang et al. 2023,
arXiv 2303.16199, section 3).

    h_t' = h_t + W_o concat_i( g softmax(q_t,i K_i^T / sqrt(d)) V_i ),   K = W_k P,   V = W_v P

Each layer has its own prompt P ``[1, n, width]`` and gate g ``[1]``; K has no positional encoding. The
softmax over the prompt is separate from that over the tokens, so that a gate of zero gives exactly the base.
g is used without a tanh, as in PEFT. If the output projection has a bias, PEFT adds it a second time, even at
a gate of zero; here it is added once. In GPT-2 PEFT leaves W_o out, and so does this method.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import (
    FOR_TRAINING,
    METHODS,
    NOT_IN_LAYERS,
    Method,
    NoBranch,
    NonNegativeInt,
    PeftConfig,
    PeftForm,
    PositiveInt,
    Shapes,
    Site,
    SiteConfigs,
    normal,
)
from .forms.attention import TRAITS, AttentionForm

_PROMPT, _GATE = "adaption_prompt", "adaption_gate"


@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter(NoBranch):
    """``adapter_len`` is the length of each prompt; ``adapter_layers`` counts the model's last layers that
    have one, 0 means all.

    ``targets`` may name attention modules instead; then ``adapter_layers`` is ignored.

    Example:
        >>> LLaMAAdapter(adapter_len=10, adapter_layers=30).scale
        1.0
    """

    targets: str | tuple[str, ...] = field(default="all-attention", metadata=FOR_TRAINING)
    adapter_len: PositiveInt = 10
    adapter_layers: NonNegativeInt = 0


def _shapes(cfg: LLaMAAdapter, site: Site) -> Shapes:
    return {_PROMPT: (1, cfg.adapter_len, site.in_features), _GATE: (1,)}


def _to_peft(sites: SiteConfigs) -> PeftConfig | None:
    """Returns PEFT's config, or None: PEFT counts layers from the end, so its config can name only a model's
    last layers.
    """
    (cfg, *other_configs), leaves = sites.values(), {path.rpartition(".")[2] for path in sites}
    # The empty path stands for a config without sites, which only lists PEFT's keys.
    if sites.keys() != {""} and (
        cfg.adapter_layers != len(sites) or len(leaves) > 1 or any(other != cfg for other in other_configs)
    ):
        return None
    return {
        "adapter_len": cfg.adapter_len,
        "adapter_layers": cfg.adapter_layers,
        "target_modules": leaves.pop() or None,
    }


llama_adapter = METHODS.register(
    Method(
        name="llama_adapter",
        summary="prompts that the last layers attend to, through gates that begin at zero",
        paper="https://arxiv.org/abs/2303.16199",
        formula="h_t + W_o concat_i(g softmax(q_t,i (W_k P)_i^T / sqrt(d)) (W_v P)_i)",
        kind="attention",
        config=LLaMAAdapter,
        traits=TRAITS,
        shapes=_shapes,
        init=lambda cfg, site, rng: {
            _PROMPT: normal(rng, _shapes(cfg, site)[_PROMPT], 1),
            _GATE: np.zeros(1, np.float32),
        },
        normal_form=lambda cfg, params, site: AttentionForm(params[_PROMPT][0, ...], params[_GATE]),
        examples=(
            LLaMAAdapter(adapter_len=1),
            LLaMAAdapter(adapter_len=3, adapter_layers=1),
            LLaMAAdapter(adapter_len=5, adapter_layers=2),
        ),
        peft=PeftForm(
            "ADAPTION_PROMPT",
            {_PROMPT: _PROMPT, _GATE: _GATE},
            _to_peft,
            lambda config: LLaMAAdapter(
                adapter_len=config.get("adapter_len", 10), adapter_layers=config.get("adapter_layers", 0)
            ),
            lambda params: (params[_PROMPT].shape[2], params[_PROMPT].shape[2]),
            refused_by=NOT_IN_LAYERS,
        ),
    )
)
