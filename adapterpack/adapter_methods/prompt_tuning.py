"""Prompt tuning: trained embeddings before the first token (Lester et al. 2021, arXiv 2104.08691, section 2).

    x' = [P; E(x)],   P [n, in]

Section 3.2 compares the inits: embeddings of words of the vocabulary (or of a text about the task) do better
than random ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from . import METHODS, Method, PromptForm, Random, Site
from .forms.prompt import (
    STORED,
    EmbeddingConfig,
    PromptSite,
    embed,
    embedding_fields,
    peft_form,
    repeat,
    traits,
)


@dataclass(frozen=True, kw_only=True)
class PromptTuning(EmbeddingConfig):
    """``init``: ``vocabulary`` (embeddings of random words), ``random`` (uniform in [-0.5, 0.5)), or ``text``
    (of ``text``/``token_ids``).

    Example:
        >>> PromptTuning(num_virtual_tokens=8, init="random").scale
        1.0
    """

    init: Literal["vocabulary", "random", "text"] = "vocabulary"


def start(cfg: Any, site: Site, rng: Random) -> np.ndarray:
    """Returns initial embeddings ``[n, in]`` according to ``cfg.init``.

    Raises:
        ValueError: ``init`` is ``text`` and the config has no text.
    """
    count = cfg.num_virtual_tokens
    if cfg.init == "random":
        return rng.uniform(-0.5, 0.5, (count, site.in_features)).astype(np.float32)
    if cfg.init == "text" and not cfg.token_ids:
        raise ValueError("init: text needs a text, or token_ids")
    words = max(1, site.vocabulary) if isinstance(site, PromptSite) else 1
    return embed(
        site, repeat(cfg.token_ids, count) if cfg.init == "text" else rng.integers(0, words, count).tolist()
    )


PEFT_INIT = {
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "tokenizer_name_or_path": None,
    "tokenizer_kwargs": None,
}
"""PEFT's keys of the init, set so that PEFT does not run it again: it would need a tokenizer by name."""

prompt_tuning = METHODS.register(
    Method(
        name="prompt_tuning",
        summary="trained embeddings before the first token",
        paper="https://arxiv.org/abs/2104.08691",
        formula="x' = [P; E(x)]",
        kind="prompt",
        config=PromptTuning,
        traits=traits(),
        shapes=lambda cfg, site: {STORED: (cfg.num_virtual_tokens, site.in_features)},
        init=lambda cfg, site, rng: {STORED: start(cfg, site, rng)},
        normal_form=lambda cfg, params, site: PromptForm(embeds=params[STORED]),
        examples=(
            PromptTuning(num_virtual_tokens=3),
            PromptTuning(num_virtual_tokens=1, init="random"),
            PromptTuning(num_virtual_tokens=5, init="text", token_ids=(4, 7)),
        ),
        peft=peft_form(
            "PROMPT_TUNING",
            lambda cfg: dict(PEFT_INIT),
            lambda config: PromptTuning(**embedding_fields(config)),
            parts=True,
        ),
    )
)
