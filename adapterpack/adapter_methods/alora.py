"""Activated LoRA: a LoRA that acts only from its invocation tokens on (Greenewald et al. 2025, arXiv
2504.12397, section 3).

    y'_t = base(x_t) + s * B (A x_t)  for t >= t0,   y'_t = base(x_t)  for t < t0

t0 is the first token of the last occurrence of the invocation tokens in the row; a row without them gets the
base model's output. All tokens before the invocation therefore have the base's keys and values, and the
adapter can continue a KV cache that the base filled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from . import LINEAR, LORA_ALONE, METHODS, TRANSPOSED
from .core.token_positions import Invoked, require_invocation
from .lora import LoRA, derive_form, lora
from .peft.base_change import require_kept_base

_TOKENS = "alora_invocation_tokens"


@dataclass(frozen=True)
class ALoRA(LoRA):
    """The hyper-parameters of LoRA, and the token ids that invoke the adapter, under PEFT's name.

    Example:
        >>> ALoRA(r=8, alora_invocation_tokens=(5, 6)).acts
        Invoked(tokens=(5, 6))
    """

    alora_invocation_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_invocation(_TOKENS, self.alora_invocation_tokens)

    @property
    def acts(self) -> Invoked:
        """Acts on all positions from the invocation on."""
        return Invoked(self.alora_invocation_tokens)


alora = METHODS.register(
    lora._replace(
        name="alora",
        summary=(
            "a LoRA that acts from its invocation tokens on, so that the cache of what is before them is "
            "the base's"
        ),
        paper="https://arxiv.org/abs/2504.12397",
        formula="y'_t = W x_t + b + s B A x_t from the last invocation on, W x_t + b before it",
        config=ALoRA,
        traits=replace(lora.traits, layers=LINEAR),
        examples=(
            ALoRA(r=1, alora_invocation_tokens=(0,)),
            ALoRA(r=3, alpha=5, alora_invocation_tokens=(2, 3)),
            ALoRA(r=4, use_rslora=True, dropout=0.1, alora_invocation_tokens=(4,)),
            ALoRA(r=2, init="pissa", alora_invocation_tokens=(1, 2)),
        ),
        peft=derive_form(
            ALoRA,
            _TOKENS,
            suffixes={},
            write=lambda cfg: list(cfg.alora_invocation_tokens),
            read=lambda tokens: {_TOKENS: tuple(tokens) if isinstance(tokens, list) else ()},
            layers=TRANSPOSED,
            undo_base_change=require_kept_base,
            refused_by={
                **LORA_ALONE,
                "transformers": "it acts at all positions, those before the invocation, too",
            },
        ),
    )
)
