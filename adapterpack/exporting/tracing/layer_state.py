"""What the layers of a decoder keep between tokens, as named tensors.

transformers keeps it in a cache with a layer object for each layer of the model. :data:`LAYERS` says for each
class of them which class traces it, and :func:`state_of` which tensors it holds: keys and values, which grow
with the tokens, and the states of convolutions and recurrences, which have a fixed size and are replaced. The
names are those that onnxruntime-genai uses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ...errors import Unsupported

LayerStates = Sequence[Mapping[str, Tensor]]
"""For each layer the tensors that it keeps, by name; none for a layer that keeps nothing."""


Mask = TypeVar("Mask", Tensor, np.ndarray)


class _Unpadded:
    """A layer whose convolutions see zeros in place of padding, as before the first token of a row alone.

    ``mask`` ``[batch, total]`` is the mask of the pass.
    """

    mask: Tensor | None = None

    def update_conv_state(self, conv_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Returns the previous states followed by the new ones ``[batch, channels, tokens]``."""
        if self.mask is not None:
            conv_states = conv_states * self.mask[:, None, -conv_states.shape[-1] :].to(conv_states.dtype)
        return super().update_conv_state(conv_states, *args, **kwargs)  # type: ignore[misc, no-any-return]


class _Linear(_Unpadded, LinearAttentionLayer):
    pass


class _LinearAndFull(_Unpadded, LinearAttentionAndFullAttentionLayer):
    pass


class LayerCache(DynamicCache):
    """A cache that holds the recurrent state which a layer read last, ``read``: one for each head where the
    layer runs its heads apart.
    """

    read: Iterator[Tensor] = iter(())

    def __init__(self, *pairs: object, config: PretrainedConfig | None = None) -> None:
        DynamicCache.__init__(self, *pairs, config=config)

    def __len__(self) -> int:
        return len(self.layers)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Returns a layer's recurrent state, None before its first pass."""
        state = super().get_recurrent_state(layer_idx, state_idx)
        if state is not None:
            self.read = iter(state.unbind(1) if state.ndim == 4 else [state])
        return state  # type: ignore[no-any-return]

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """Returns a layer's recurrent state, as the cache of a model with its own class calls it."""
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Keeps a layer's recurrent state, likewise."""
        self.layers[layer_idx].has_previous_state[0] = True
        self.update_recurrent_state(linear_cache, layer_idx)


LAYERS: dict[type, type] = {
    DynamicLayer: DynamicLayer,
    # the mask applies the window, and rows of one batch reach it at different times
    DynamicSlidingWindowLayer: DynamicLayer,
    DynamicIndexedLayer: DynamicIndexedLayer,
    LinearAttentionLayer: _Linear,
    LinearAttentionAndFullAttentionLayer: _LinearAndFull,
    LinearAttentionAndSlidingWindowAttentionLayer: _LinearAndFull,
    DummyLayer: DummyLayer,
}
"""The class of a layer in a model's own cache -> the class with which it is traced."""


def make_cache(model: PreTrainedModel, mask: Tensor | None, states: LayerStates) -> LayerCache:
    """Returns the cache of a decoder, filled with ``states``; empty before the first pass, without any. It is
    also of the class that the model's own module defines, if it does.

    Raises:
        Unsupported: a layer keeps something that is not known by name.
    """
    own = [
        kind
        for kind in vars(sys.modules[type(model).__module__]).values()
        if isinstance(kind, type) and issubclass(kind, DynamicCache) and kind is not DynamicCache
    ]
    cache: LayerCache = type("LayerCache", (LayerCache, *own), {})(config=model.config)
    unknown = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in LAYERS})
    if unknown:
        raise Unsupported(
            "a layer of the model keeps a state that cannot be told by name",
            found=", ".join(unknown),
            expected=", ".join(kind.__name__ for kind in LAYERS),
        )
    if all(states) and all(LAYERS[type(layer)] is DynamicLayer for layer in cache.layers):
        return pairs_cache(states)
    # a model that runs some of its layers again keeps the states of each pass, behind those of all layers
    own_layers = [*cache.layers]
    for tensors in states[len(own_layers) :]:
        alike = (
            layer for layer, own in zip(own_layers, states, strict=False) if own.keys() == tensors.keys()
        )
        cache.layers.append(next(alike))
    cache.layers = [
        LAYERS[type(layer)](number_of_states=getattr(layer, "number_of_states", 1)) for layer in cache.layers
    ]
    for layer in cache.layers:
        if isinstance(layer, _Unpadded):
            layer.mask = mask
    for layer, tensors in zip(cache.layers, states, strict=False):
        _fill(layer, tensors)
    return cache


def pairs_cache(states: LayerStates) -> LayerCache:
    """Returns a cache of keys and values alone."""
    return LayerCache([(tensors["key"], tensors["value"]) for tensors in states])


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether layers of a decoder keep a state of fixed size."""
    try:
        layers = DynamicCache(config=model.config).layers
    except AttributeError:  # a config without layers, of a model that makes its cache in another way
        return False
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def whole_cache(model: PreTrainedModel) -> DynamicCache | None:
    """Returns an empty cache that keeps all tokens for a model whose own would drop those that left a window,
    and None for any other: where the mask has no window (Moshi), a step on the own cache computes something
    else than a pass over all tokens.
    """
    if is_recurrent(model):
        return None
    try:
        cache = DynamicCache(config=model.config)
    except AttributeError:
        return None
    slides = [type(layer) is DynamicSlidingWindowLayer for layer in cache.layers]
    cache.layers = [DynamicLayer() if out else layer for layer, out in zip(cache.layers, slides, strict=True)]
    return cache if any(slides) else None


def own_mask(cache: DynamicCache | EncoderDecoderCache, mask: Mask, tokens: int) -> Mask:
    """Returns the mask that a model takes for a pass of so many ``tokens``: without any attention layer, it
    covers only these.
    """
    # decoders that could also have an encoder (BERT's kin) return the cache of both
    layers = getattr(cache, "self_attention_cache", cache).layers
    return mask if any(isinstance(layer, CacheLayerMixin) for layer in layers) else mask[:, -tokens:]


def state_of(cache: DynamicCache) -> list[dict[str, Tensor]]:
    """Returns the tensors that each layer of a cache keeps.

    Raises:
        Unsupported: a recurrent layer keeps its state elsewhere, or an indexer more than its keys.
    """
    states = [dict(_tensors_of(layer)) for layer in cache.layers]
    if any(getattr(layer, "indexer_position_ids", None) is not None for layer in cache.layers):
        raise Unsupported(
            "an indexer of the model keeps positions beside its keys, and selects token by token in Python",
            found="indexer_position_ids",
            expected="keys and values, keys of an indexer, states",
            remedy="run this model under torch",
        )
    for number, (layer, tensors) in enumerate(zip(cache.layers, states, strict=True)):
        if isinstance(layer, LinearAttentionCacheLayerMixin) and not tensors:
            raise Unsupported(
                "a layer of the model keeps its recurrent state in its modules, outside of the cache",
                found=f"layer {number}",
                expected="a state in transformers' cache",
            )
    return states


def _tensors_of(layer: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(layer, DynamicLayer) and layer.keys is not None:
        yield from (("key", layer.keys), ("value", layer.values))
    if isinstance(layer, DynamicIndexedLayer) and layer.indexer_keys is not None:
        yield "indexer_key", layer.indexer_keys
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for name, held in _slots_of(layer).items():
            yield from (
                (name + _suffix(number), value) for number, value in held.items() if value is not None
            )


def _fill(layer: object, tensors: Mapping[str, Tensor]) -> None:
    """Puts the tensors of an earlier pass into a new layer, as copies: a layer writes over its states."""
    if isinstance(layer, DynamicLayer) and "key" in tensors:
        layer.update(tensors["key"], tensors["value"])
    if isinstance(layer, DynamicIndexedLayer) and "indexer_key" in tensors:
        layer.update_indexer(tensors["indexer_key"])
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for name, held in _slots_of(layer).items():
            for number in held:
                if (value := tensors.get(name + _suffix(number))) is not None:
                    layer.lazy_initialization(**{f"{name}s": value}, state_idx=number)
                    held[number] = value.clone()
                    layer.has_previous_state[number] = True


def _slots_of(layer: LinearAttentionCacheLayerMixin) -> dict[str, dict[int, Tensor | None]]:
    return {"conv_state": layer.conv_states, "recurrent_state": layer.recurrent_states}


def _suffix(number: int) -> str:
    return f"_{number}" if number else ""
