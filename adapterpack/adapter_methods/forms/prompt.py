"""The normal form of the kind "prompt" and the base configs of its methods: virtual tokens before the first
real token, as embeddings or as keys and values in the KV cache.

A prompt method reduces its trained tensors to a :class:`PromptForm`. Whatever computes the prompt during
training (a network, a product, a projection) is dropped when the adapter is packed. A prompt acts on the
model as a unit, so it has one site, which is not a module: its path is
:data:`~adapterpack.adapter_methods.core.site.PROMPT`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from ...errors import Unsupported, excerpt
from .. import (
    NOT_IN_LAYERS,
    PROMPT,
    Array,
    Arrays,
    NonNegativeInt,
    Params,
    PeftConfig,
    PeftContent,
    PeftForm,
    PositiveInt,
    Random,
    Shape,
    Site,
    SiteConfig,
    SiteConfigs,
    Traits,
    array_namespace,
    require_whole,
)

STORED = "prompt_embeddings"
"""The parameter that every prompt method stores, under the name PEFT uses."""
Rows = Callable[[Sequence[int]], np.ndarray]
"""Token ids -> an array with something for each."""


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

    num_virtual_tokens: PositiveInt = 20
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

    num_layers: NonNegativeInt = 0
    num_heads: NonNegativeInt = 0
    head_dim: NonNegativeInt = 0

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

    def with_sizes(self, site: Site, **changes: Any) -> Self:
        """Returns the config as a pack stores it, with the sizes of the model and these changes."""
        layers, heads, head_dim = self.sizes(site)
        return replace(self, num_layers=layers, num_heads=heads, head_dim=head_dim, **changes)


class PromptForm(NamedTuple):
    """The normal form of a prompt: ``embeds`` ``[n, in]``, or ``[tasks, n, in]`` with one prompt per task; or
    ``cache`` ``[layers, 2, heads, n, head_dim]``.

    ``task`` is the index of the default prompt.
    """

    embeds: Array | None = None
    cache: Array | None = None
    task: int = 0

    @property
    def length(self) -> int:
        """The number of virtual tokens."""
        prompt: Any = self.cache if self.embeds is None else self.embeds
        return int(prompt.shape[-2])


def as_cache(flat: Array, sizes: tuple[int, int, int]) -> Array:
    """Reshapes PEFT's ``[n, layers * 2 * heads * head_dim]`` to ``[layers, 2, heads, n, head_dim]``;
    ``sizes`` are layers, heads and head_dim.

    Example:
        >>> as_cache(np.arange(12.0).reshape(2, 6), (1, 1, 3))[0, 1, 0].tolist()
        [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0]]
    """
    xp = array_namespace(flat)
    layers, heads, head_dim = sizes
    return xp.permute_dims(xp.reshape(flat, (flat.shape[0], layers, 2, heads, head_dim)), (1, 2, 3, 0, 4))


def as_flat(cache: np.ndarray) -> np.ndarray:
    """The inverse of :func:`as_cache`: reshapes ``[layers, 2, heads, n, head_dim]`` to ``[n, layers * 2 *
    heads * head_dim]``.
    """
    return np.ascontiguousarray(np.transpose(cache, (3, 0, 1, 2, 4))).reshape(cache.shape[3], -1)


def repeat(ids: Sequence[int], count: int) -> list[int]:
    """Cuts or repeats ids until there are ``count``.

    Example:
        >>> repeat([5, 6, 7], 5)
        [5, 6, 7, 5, 6]
    """
    return [ids[at % len(ids)] for at in range(count)]


def embed(site: Site, ids: Sequence[int]) -> np.ndarray:
    """Returns the model's own embeddings of token ids, ``[len(ids), in]`` float32.

    Raises:
        Unsupported: the site has no model to read them from.
    """
    if not isinstance(site, PromptSite) or site.embed is None:
        raise Unsupported(
            "this init reads the model's embeddings, and there is no model",
            where=site.path,
            remedy="choose init: random",
        )
    return np.asarray(site.embed(ids), np.float32)


def prefill(cfg: CacheConfig, site: Site) -> np.ndarray:
    """Returns the base model's KV cache for the config's ``token_ids``, repeated to the number of virtual
    tokens: ``[n, width]`` float32.

    Raises:
        ValueError: the config has no token ids.
        Unsupported: the site has no model to run.
    """
    if not cfg.token_ids:
        raise ValueError("init: text needs a text, or token_ids")
    if not isinstance(site, PromptSite) or site.prefill is None:
        raise Unsupported(
            "this init reads the model's cache, and there is no model",
            where=site.path,
            remedy="choose init: random",
        )
    return as_flat(np.asarray(site.prefill(repeat(cfg.token_ids, cfg.num_virtual_tokens)), np.float32))


def uniform(rng: Random, fan_in: int, shape: Shape) -> np.ndarray:
    """Draws initial values as torch does for a linear or recurrent layer: uniform in ``[-1/sqrt(fan_in),
    1/sqrt(fan_in))``, float32.
    """
    bound = fan_in**-0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def linear(x: Array, params: Params, name: str) -> Array:
    """Computes ``x W^T + b`` with the parameters ``name_weight`` and ``name_bias``."""
    return x @ params[f"{name}_weight"].T + params[f"{name}_bias"]


def traits(frozen: tuple[str, ...] = ()) -> Traits:
    """Returns the traits of a prompt method: it changes no weight, and only one prompt is active at a
    time.
    """
    return Traits(
        identity_at_init=False,
        row_separable=False,
        quantizable=False,
        layers=("prompt",),
        frozen=frozen,
        exclusive=True,
    )


def peft_form(
    peft_type: str,
    to_config: Callable[[Any], PeftConfig],
    from_config: Callable[[PeftConfig], Any],
    names: tuple[str, ...] = (STORED,),
    wide: bool = True,
    parts: bool = False,
) -> PeftForm:
    """Builds the :class:`PeftForm` of a prompt method from functions that convert its config; PEFT stores the
    tensors under their bare names.

    ``wide``: the stored tensor is as wide as the model's embeddings. ``parts``: the method supports
    encoder-decoder models. For embeddings PEFT then stores a prompt for both parts and uses the encoder's.
    Keys and values belong to the decoder: PEFT gives layer i those of layer ``2 i`` modulo the number of
    layers, because it stores them once for each part and reads four tensors per layer.
    """

    def written(sites: SiteConfigs) -> PeftConfig:
        cfg = next(iter(sites.values()))
        heads = getattr(cfg, "num_heads", 0)
        head_dim = getattr(cfg, "head_dim", 0)
        return {
            "num_virtual_tokens": cfg.num_virtual_tokens,
            "num_layers": getattr(cfg, "num_layers", 0) or None,
            "num_attention_heads": heads or None,
            "token_dim": heads * head_dim or None,
            "num_transformer_submodules": 1,
            **to_config(cfg),
        }

    def read(config: PeftConfig) -> Any:
        if config.get("num_transformer_submodules") not in ({None, 1, 2} if parts else {None, 1}):
            raise Unsupported(
                "this method's prompts of models with an encoder and a decoder are not supported",
                where="num_transformer_submodules",
                expected=1,
                found=excerpt(config["num_transformer_submodules"]),
            )
        return from_config(config)

    def used(content: PeftContent) -> PeftContent:
        """Keeps only what PEFT uses of the stored tensor, for a model with an encoder and a decoder."""
        if content.written.get("num_transformer_submodules") != 2:
            return content
        rows = content.config.num_virtual_tokens

        def taken(value: np.ndarray) -> np.ndarray:
            if not wide:
                return _take(value, content.config.num_layers)
            return value[:rows] if len(value) == 2 * rows else value

        return content.change_sites(lambda params: {name: taken(value) for name, value in params.items()})

    def equivalent(sites: SiteConfigs, task: str | None) -> bool:
        """Whether PEFT computes the same: PEFT pools a classifier's first virtual token, and mixes up the
        layers of a decoder that has an encoder.
        """
        pooled = all(getattr(cfg, "pooled", "prompt") == "prompt" for cfg in sites.values())
        return (task != "SEQ_CLS" or pooled) and (task != "SEQ_2_SEQ_LM" or wide)

    def reorder_for_peft(cfg: Any, params: Params, task: str | None) -> tuple[PeftConfig, Arrays] | None:
        placed = _place(np.asarray(params[STORED]), cfg.num_layers) if task == "SEQ_2_SEQ_LM" else None
        return None if placed is None else ({"num_transformer_submodules": 2}, {**params, STORED: placed})

    def features(params: Params) -> tuple[int | None, None]:
        return params[STORED].shape[1] if wide else None, None

    # Embeddings are read directly; only keys and values need to be reordered for a decoder's layers.
    return PeftForm(
        peft_type,
        {name: name for name in names},
        written,
        read,
        features,
        site=PROMPT,
        equivalent=equivalent,
        from_peft_file=used if parts else None,
        overrides={"reorder_for_peft": reorder_for_peft} if parts and not wide else {},
        refused_by=NOT_IN_LAYERS,
    )


def _take(flat: np.ndarray, layers: int) -> np.ndarray:
    """Returns ``[n, layers * width]`` with the keys and values that PEFT reads at each layer of the decoder
    of an encoder-decoder model.
    """
    by_layer = flat.reshape(len(flat), layers, -1)
    return np.ascontiguousarray(by_layer[:, 2 * np.arange(layers) % layers]).reshape(len(flat), -1)


def _place(flat: np.ndarray, layers: int) -> np.ndarray | None:
    """Returns the tensor from which :func:`_take` reads ``flat``, with zeros where PEFT reads nothing; None
    if PEFT would read one entry for two layers that differ.
    """
    by_layer = flat.reshape(len(flat), layers, -1)
    placed = np.zeros_like(by_layer)
    placed[:, 2 * np.arange(layers) % layers] = by_layer
    result = placed.reshape(len(flat), -1)
    return result if np.array_equal(_take(result, layers), flat) else None


def embedding_fields(config: PeftConfig) -> PeftConfig:
    """Reads the fields of :class:`EmbeddingConfig` from PEFT's config."""
    return {
        "num_virtual_tokens": config.get("num_virtual_tokens", 20),
        "pooled": "prompt" if config.get("task_type") == "SEQ_CLS" else "input",
    }


def cache_fields(config: PeftConfig) -> PeftConfig:
    """Reads the fields of :class:`CacheConfig` from PEFT's config, whose ``token_dim`` is the number of heads
    times ``head_dim``.

    Raises:
        ValueError: a size is missing, or ``token_dim`` is not a multiple of the number of heads.
    """
    layers, heads, token_dim = (config.get(key) for key in ("num_layers", "num_attention_heads", "token_dim"))
    for name, value in (("num_layers", layers), ("num_attention_heads", heads), ("token_dim", token_dim)):
        require_whole(name, value)
    if token_dim % heads:  # type: ignore[operator]
        raise ValueError(f"token_dim {token_dim} is no multiple of num_attention_heads {heads}")
    return {
        "num_virtual_tokens": config.get("num_virtual_tokens", 20),
        "num_layers": layers,
        "num_heads": heads,
        "head_dim": token_dim // heads,  # type: ignore[operator]
    }
