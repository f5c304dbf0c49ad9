"""The base configs of prompt methods: of all, of those that store embeddings, and of those that store a
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.config import SiteConfig, require_choice, require_whole
from ..core.site import Site

Rows = Callable[[Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class PromptSite(Site):
    """The model as a prompt method sees it; ``in_features`` is the width of its embeddings.

    ``embed`` gives the embeddings ``[n, in]`` of token ids, ``prefill`` their keys and values ``[layers, 2,
    heads, n, head_dim]`` as the base makes them; both are there only where a model is. ``heads`` are those of
    the keys.
    """

    layers: int = 0
    heads: int = 0
    head_dim: int = 0
    vocabulary: int = 0
    embed: Rows | None = field(default=None, compare=False, repr=False)
    prefill: Rows | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class PromptConfig(SiteConfig):
    """What the configs of all prompt methods share. A prompt has no targets and no branch whose input could
    be dropped.

    ``token_ids`` or ``text``: what an init reads; a text is turned into ids by the model's own tokenizer.
    """

    num_virtual_tokens: int = 20
    token_ids: tuple[int, ...] = ()
    text: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("num_virtual_tokens", self.num_virtual_tokens)
        if self.targets != "all-linear" or self.dropout:
            raise ValueError("a prompt stands before the first token: it takes neither targets nor dropout")
        for token in self.token_ids:
            require_whole("token_ids", token, 0)


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(PromptConfig):
    """A prompt of embeddings. ``pooled``: an encoder's pooled output is that of its own first token
    (``input``), or, as PEFT has it, that of the first virtual one (``prompt``).
    """

    pooled: str = "input"

    @property
    def learnt(self) -> tuple[tuple[int, int, float], ...]:
        """What training is to predict of the prompt itself: (place in it, token id, weight in the loss)."""
        return ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("pooled", self.pooled, ("input", "prompt"))


@dataclass(frozen=True, kw_only=True)
class CacheConfig(PromptConfig):
    """A prompt of keys and values; the model's sizes (0: not known yet) are written into the pack."""

    num_layers: int = 0
    num_heads: int = 0
    head_dim: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_layers", "num_heads", "head_dim"):
            require_whole(name, getattr(self, name), 0)

    def sizes(self, site: Site) -> tuple[int, int, int]:
        """Layers, heads of the keys, and their width; as the config says them, or the model."""
        sizes = (self.num_layers, self.num_heads, self.head_dim)
        return (
            (site.layers, site.heads, site.head_dim) if 0 in sizes and isinstance(site, PromptSite) else sizes
        )

    def width(self, site: Site) -> int:
        """How many numbers one virtual token has: ``layers * 2 * heads * head_dim``."""
        layers, heads, head_dim = self.sizes(site)
        return layers * 2 * heads * head_dim
