"""The base configs of prompt methods: for all prompts, for prompts stored as embeddings, and for prompts
stored as a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..core.config import Count, SiteConfig, Whole, require_whole
from ..core.site import Site

Rows = Callable[[Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class PromptSite(Site):
    """The model as a prompt method sees it; ``in_features`` is the width of its embeddings.

    ``embed`` returns the embeddings ``[n, in]`` of token ids, and ``prefill`` the keys and values ``[layers,
    2, heads, n, head_dim]`` that the base computes for them; both are None without a model. ``heads`` counts
    the key heads.
    """

    layers: int = 0
    heads: int = 0
    head_dim: int = 0
    vocabulary: int = 0
    embed: Rows | None = field(default=None, compare=False, repr=False)
    prefill: Rows | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class PromptConfig(SiteConfig):
    """The settings that all prompt methods share. A prompt has no targets, and no branch for dropout.

    ``token_ids`` or ``text`` initialise the prompt; the model's own tokenizer turns a text into ids.
    """

    num_virtual_tokens: Whole = 20
    token_ids: tuple[int, ...] = ()
    text: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets != "all-linear" or self.dropout:
            raise ValueError("a prompt stands before the first token: it takes neither targets nor dropout")
        for token in self.token_ids:
            require_whole("token_ids", token, 0)


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(PromptConfig):
    """A prompt of embeddings. ``pooled`` selects which position an encoder pools: its first real token
    (``input``), or the first virtual token (``prompt``), as PEFT does.
    """

    pooled: Literal["input", "prompt"] = "input"

    @property
    def learnt(self) -> tuple[tuple[int, int, float], ...]:
        """The virtual tokens that training must predict: (position in the prompt, token id, weight in the
        loss).
        """
        return ()


@dataclass(frozen=True, kw_only=True)
class CacheConfig(PromptConfig):
    """A prompt of keys and values. The pack stores the model's sizes; 0 means not known yet."""

    num_layers: Count = 0
    num_heads: Count = 0
    head_dim: Count = 0

    def sizes(self, site: Site) -> tuple[int, int, int]:
        """Returns the number of layers, the number of key heads and ``head_dim``, from the config or else
        from the model.
        """
        sizes = (self.num_layers, self.num_heads, self.head_dim)
        return (
            (site.layers, site.heads, site.head_dim) if 0 in sizes and isinstance(site, PromptSite) else sizes
        )

    def width(self, site: Site) -> int:
        """Returns how many numbers one virtual token has: ``layers * 2 * heads * head_dim``."""
        layers, heads, head_dim = self.sizes(site)
        return layers * 2 * heads * head_dim
