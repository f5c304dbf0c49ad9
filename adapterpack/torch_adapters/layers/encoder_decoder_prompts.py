"""Adds prompts to encoder-decoder models, as PEFT does: embeddings before the encoder's tokens, whose states
the decoder also attends to, or keys and values before the decoder's own tokens.

    h = encoder([P; E(x)]),   y = decoder(y_<t, h)      prefixes:  K' = [P_K; K], V' = [P_V; V] in the
    decoder's attention to itself
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from ...adapter_methods import PROMPT, PromptForm
from ...errors import Unsupported
from .calls import Kwargs, argument_names, named_arguments
from .layer import NewAdapter
from .prompts import CACHES, OWNER, Prompts, Redirect, cached_length, of_transformers, tokens_of, with_room


def around_embedding(model: nn.Module, module: nn.Module) -> Prompts:
    """Returns the wrapper that holds a model's prompts, for an encoder-decoder or another model."""
    found = of_transformers(model)
    return EncoderDecoderPrompts(module, found) if found.config.is_encoder_decoder else Prompts(module, found)


class EncoderDecoderPrompts(Prompts):
    """The input embedding, with prompts for the encoder and decoder above it. Callers' masks cover the
    model's own tokens only.
    """

    def __init__(self, embedding: nn.Module, model: PreTrainedModel) -> None:
        super().__init__(embedding, model)
        decoder = model.get_decoder()
        self._decoder = Redirect(decoder, self._around_decoder)
        self._decoder_cache = next((name for name in CACHES if name in argument_names(decoder)), CACHES[0])

    @staticmethod
    def _trunk_of(model: PreTrainedModel) -> PreTrainedModel:
        return model.get_encoder()

    @staticmethod
    def _sizes(config: Any) -> dict[str, Any]:
        """Returns the sizes of the decoder's keys and values."""
        heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
        return {
            "layers": getattr(config, "decoder_layers", None)
            or getattr(config, "num_decoder_layers", None)
            or config.num_hidden_layers,
            "heads": heads,
            "head_dim": getattr(config, "d_kv", None) or config.hidden_size // heads,
        }

    def _add(self, name: str, adapter: NewAdapter) -> None:
        """Adds a prompt; the first one also redirects the decoder's ``forward`` to this wrapper."""
        super()._add(name, adapter)
        self._decoder.begin()

    def _remove(self, name: str) -> None:
        """Removes a prompt; the last one restores the decoder's ``forward``."""
        super()._remove(name)
        if not self._names:
            self._decoder.end()

    def _around(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the encoder; its output begins with the states of the active prompt's embeddings."""
        if not self._active or self._form(self._active[-1]).embeds is None:
            return self._redirect.inner(*args, **kwargs)
        return super()._around(*args, **kwargs)

    def _length_cut(self, form: PromptForm, name: str) -> int:
        """Returns 0: the decoder attends to the prompt's states, so none are cut off."""
        return 0

    def _around_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder with masks that include the active prompt."""
        if not self._active:
            return self._decoder.inner(*args, **kwargs)
        name = self._active[-1]
        form = self._form(name)
        inputs = named_arguments(self._decoder.module, args, kwargs)
        if form.embeds is None:
            return self._with_prefix(inputs, form, name)
        states = inputs.get("encoder_hidden_states")
        mask = inputs.get("encoder_attention_mask")
        if mask is not None and states is not None:
            if mask.ndim != 2 or mask.shape[1] + form.length != states.shape[1]:
                raise Unsupported(
                    "these states of the encoder were made without the prompt",
                    where=PROMPT,
                    found=tuple(mask.shape),
                    expected=(states.shape[0], states.shape[1] - form.length),
                    remedy="give the model its token ids and their mask, not an encoder's output",
                )
            inputs["encoder_attention_mask"] = with_room(mask, form.length)
        return self._decoder.inner(**inputs)

    def _with_prefix(self, inputs: Kwargs, form: PromptForm, name: str) -> Any:
        """Runs the decoder with the prompt's keys and values at the start of its self-attention cache."""
        given = [inputs.pop(name) for name in CACHES if name in inputs]
        cache = next((each for each in given if each is not None), None)
        if cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if not cached_length(cache, name, EncoderDecoderCache):
            self._fill(cache.self_attention_cache, form, len(tokens_of(inputs)))
            setattr(cache, OWNER, name)
        if (mask := inputs.get("attention_mask")) is not None:
            inputs["attention_mask"] = with_room(mask, form.length)
        return self._decoder.inner(**{**inputs, self._decoder_cache: cache})

    def _prefill(self, ids: Sequence[int]) -> np.ndarray:
        raise Unsupported(
            "an encoder and decoder has no cache of a text that a prompt could begin with",
            where=PROMPT,
            found=type(self._trunk).__name__,
            remedy="choose another init",
        )
