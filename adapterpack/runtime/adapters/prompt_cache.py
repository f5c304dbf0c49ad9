"""Builds the KV cache with which rows begin: the keys and values of their adapters' prompts.

The graph needs no change for prompts: their keys and values enter through its ordinary cache inputs. Rows
with shorter prompts, or without one, are padded on the left; the attention mask hides the padding, and
position ids do not count it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...adapter_methods import Arrays, PromptForm, Tensors, complete
from ...bundle import PAST, empty_caches
from ...errors import BaseMismatch, Unsupported
from ...pack import Pack
from ...slots import virtual_tokens
from ..ort import array_of, value_of

Prompts = Tensors
"""Adapter name -> ``[layers, 2, heads, n, head_dim]`` float32."""


class PromptCache(NamedTuple):
    """The initial cache of a batch: ``cache`` maps input names to ``[rows, heads, width, head_dim]``;
    ``mask`` is ``[rows, width]`` int64.
    """

    cache: Arrays
    mask: np.ndarray

    @property
    def width(self) -> int:
        """The number of positions of the longest prompt in the batch."""
        return int(self.mask.shape[1])

    @property
    def lengths(self) -> np.ndarray:
        """The number of virtual tokens of each row, ``[rows, 1]``."""
        counted: np.ndarray = self.mask.sum(axis=1, keepdims=True)
        return counted

    def covering(self, mask: np.ndarray) -> np.ndarray:
        """Prepends the mask of the prompts to a mask of the rows' own tokens."""
        return np.concatenate([self.mask, mask], axis=1)


def make_prompt_cache(
    inputs: Mapping[str, Any], prompts: Prompts, names: Sequence[str | None], left: bool = True
) -> PromptCache:
    """Builds the initial cache of rows with these adapters for a graph with these inputs. The cache has width
    0 if no row has a prompt.

    Shorter prompts are padded on the left; or on the right for a decoder with cross-attention, which has no
    mask for its own cache, so that :func:`split_by_length` removes the padding before the pass.

    Example:
        >>> from types import SimpleNamespace
        >>> inputs = {f"past_key_values.0.{part}": SimpleNamespace(shape=["b", 1, "p", 2]) for part in ("key",
        ...     "value")}
        >>> prefix = make_prompt_cache(inputs, {"a": np.ones((1, 2, 1, 3, 2), np.float32)}, ["a", None])
        >>> prefix.mask.tolist(), prefix.cache["past_key_values.0.key"].shape
        ([[1, 1, 1], [0, 0, 0]], (2, 1, 3, 2))
    """
    by_row = [prompts.get(name) if name is not None else None for name in names]
    width = max((prompt.shape[3] for prompt in by_row if prompt is not None), default=0)
    mask = np.zeros((len(names), width), np.int64)
    cache = empty_caches(inputs, len(names), width)
    for row, prompt in enumerate(by_row):
        if prompt is not None:
            place = slice(width - prompt.shape[3], width) if left else slice(prompt.shape[3])
            mask[row, place] = 1
            for name, array in cache.items():
                array[row, :, place] = prompt[layer_and_side(name)]
    return PromptCache(cache, mask)


def prompt_lengths(prompts: Prompts, names: Sequence[str | None]) -> list[int]:
    """Returns how many positions of the cache the prompt of each row takes."""
    return [prompts[name].shape[3] if name is not None and name in prompts else 0 for name in names]


def split_by_length(
    feeds: Mapping[str, Any], lengths: Sequence[int]
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Groups the rows of a pass by the length of their prompts and yields the indices and feeds of each
    group. The feeds leave out the padding of :func:`make_prompt_cache`.
    """
    for length in dict.fromkeys(lengths):
        rows = np.flatnonzero(np.array(lengths) == length)
        spare = max(lengths) - length
        some = {name: array_of(value)[rows] for name, value in feeds.items()}
        yield (
            rows,
            {
                name: value_of(
                    np.ascontiguousarray(
                        array[:, :, : array.shape[2] - spare] if name.startswith(PAST) else array
                    )
                )
                for name, array in some.items()
            },
        )


def prompt_kv(pack: Pack, folder: Path, inputs: Mapping[str, Any]) -> np.ndarray:
    """Returns the keys and values of a pack that is a prompt, for a bundle's graph with these inputs.

    Virtual embeddings run through the graph once, as the first tokens of a row, and their keys and values are
    kept.

    Raises:
        BaseMismatch: the prompt was made for a model of other sizes.
        Unsupported: the graph has no cache, or caches of several sizes, or takes no embeddings.
    """
    others = (name for name in inputs if name.startswith(PAST) and not name.endswith((".key", ".value")))
    if (other := next(others, None)) is not None:
        raise Unsupported(
            "a prompt sets keys and values, and layers of this model keep more than these",
            where=pack.name,
            found=other.removeprefix(PAST),
            remedy="use a method that changes weights, such as lora",
        )
    sizes = {
        layer_and_side(name): (value.shape[1], value.shape[3])
        for name, value in inputs.items()
        if name.startswith(PAST)
    }
    # In an encoder-decoder, virtual tokens precede the encoder's tokens, which this graph does not see.
    if not sizes or ("input_ids" not in inputs and virtual_tokens(pack)):
        raise Unsupported(
            "the graph has neither a cache nor room for a prompt",
            where=pack.name,
            found=pack.method.name,
            remedy="export the bundle again with this adapter among the packs",
        )
    if len(set(sizes.values())) > 1:
        raise Unsupported(
            "the caches of this model have several sizes, as latent keys do, and a prompt has one",
            where=pack.name,
            found=", ".join(f"{heads} x {width}" for heads, width in sorted(set(sizes.values()))),
            remedy="use an adapter of the model's weights",
        )
    (adapter,) = pack.adapters()
    params = complete(pack.method, adapter.config, adapter.wide, adapter.site)
    form: PromptForm = pack.method.normal_form(adapter.config, params, adapter.site)
    if form.cache is not None:
        cache = np.asarray(form.cache, np.float32)
    else:
        embeds = np.asarray(form.embeds, np.float32)
        from .soft_prompt import prefill  # noqa: PLC0415 - it loads sympy, and most packs need no graph

        cache = prefill(folder, inputs, embeds[form.task] if embeds.ndim == 3 else embeds)
    made_for = dict.fromkeys(np.ndindex(*cache.shape[:2]), (cache.shape[2], cache.shape[4]))
    if made_for != sizes:
        raise BaseMismatch(
            "the prompt was made for a model of other sizes",
            where=pack.name,
            expected=sorted(set(sizes.values())),
            found=sorted(set(made_for.values())),
            remedy="export a bundle of the base that the adapter was made for",
        )
    return np.ascontiguousarray(cache)


def layer_and_side(name: str) -> tuple[int, int]:
    """Returns the layer of a cache input, and 0 if it holds keys or 1 if it holds values."""
    layer, side = name.removeprefix(PAST).split(".")
    return int(layer), ("key", "value").index(side)
