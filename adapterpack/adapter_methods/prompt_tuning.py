"""Prompt tuning: trained embeddings before the first token (Lester et al. 2021, arXiv 2104.08691, section 2).

    x' = [P; E(x)],   P [n, in]

Section 3.2 compares the inits: embeddings of words of the vocabulary (or of a text about the task) do better
than random ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from . import METHODS, Arrays, Method, Params, Shapes, Site
from .forms.prompt import (
    STORED,
    EmbeddingConfig,
    PromptForm,
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


def _shapes(cfg: PromptTuning, site: Site) -> Shapes:
    return {STORED: (cfg.num_virtual_tokens, site.in_features)}


def start(cfg: Any, site: Site, rng: np.random.Generator) -> np.ndarray:
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


def _init(cfg: PromptTuning, site: Site, rng: np.random.Generator) -> Arrays:
    return {STORED: start(cfg, site, rng)}


def _normal_form(cfg: PromptTuning, params: Params, site: Site) -> PromptForm:
    return PromptForm(embeds=params[STORED])


def _from_peft(config: Mapping[str, Any]) -> PromptTuning:
    return PromptTuning(**embedding_fields(config))


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
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            PromptTuning(num_virtual_tokens=3),
            PromptTuning(num_virtual_tokens=1, init="random"),
            PromptTuning(num_virtual_tokens=5, init="text", token_ids=(4, 7)),
        ),
        peft=peft_form("PROMPT_TUNING", lambda cfg: dict(PEFT_INIT), _from_peft, parts=True),
    )
)
