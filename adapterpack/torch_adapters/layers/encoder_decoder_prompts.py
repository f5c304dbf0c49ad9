"""Adds prompts to encoder-decoder models, as PEFT does: embeddings before the encoder's tokens, whose states
the decoder also attends to, or keys and values before the decoder's own tokens.

    h = encoder([P; E(x)]),   y = decoder(y_<t, h)      prefixes:  K' = [P_K; K], V' = [P_V; V] in the
    decoder's attention to itself
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from ...adapter_methods import PROMPT, Traits
from ...adapter_methods.forms.prompt import PromptForm
from ...adapter_methods.forms.prompt_config import PromptSite
from ...errors import Unsupported
from .layer import NewAdapter
from .prompts import CACHES, OWNER, Prompts, of_transformers


def around_embedding(model: nn.Module, module: nn.Module, path: str, traits: Traits) -> Prompts:
    """Returns the wrapper that holds a model's prompts, for an encoder-decoder or another model."""
    found = of_transformers(model)
    return EncoderDecoderPrompts(module, found) if found.config.is_encoder_decoder else Prompts(module, found)


class EncoderDecoderPrompts(Prompts):
    """The input embedding, with prompts for the encoder and decoder above it. Callers' masks cover the
    model's own tokens only.
    """

    def __init__(self, embedding: nn.Module, model: PreTrainedModel) -> None:
        super().__init__(embedding, model)
        self._decoder_in_tuple = (model.get_decoder(),)
        self._decode = self._decoder.forward
        self._decoder_takes = tuple(inspect.signature(type(self._decoder).forward).parameters)[1:]
        self._decoder_cache = next((name for name in CACHES if name in self._decoder_takes), CACHES[0])
        config, site = model.config, self._site
        assert isinstance(site, PromptSite)
        heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
        self._site = dataclasses.replace(
            site,
            heads=heads,
            head_dim=getattr(config, "d_kv", None) or config.hidden_size // heads,
            layers=getattr(config, "decoder_layers", None)
            or getattr(config, "num_decoder_layers", None)
            or config.num_hidden_layers,
        )

    @staticmethod
    def _trunk_of(model: PreTrainedModel) -> PreTrainedModel:
        encoder: PreTrainedModel = model.get_encoder()
        return encoder

    @property
    def _decoder(self) -> PreTrainedModel:
        return self._decoder_in_tuple[0]

    def _add(self, name: str, adapter: NewAdapter) -> None:
        """Adds a prompt; the first one also redirects the decoder's ``forward`` to this wrapper."""
        first = not self._redirected
        super()._add(name, adapter)
        if first:
            self._decode = self._decoder.forward
            self._decoder.forward = self._around_decoder

    def _remove(self, name: str) -> None:
        """Removes a prompt; the last one restores the decoder's ``forward``."""
        super()._remove(name)
        if not self._names and self._decoder.__dict__.get("forward") == self._around_decoder:
            del self._decoder.forward
            # Someone else had replaced ``forward`` before; restore theirs.
            if self._decoder.forward != self._decode:
                self._decoder.forward = self._decode

    def _around(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the encoder; its output begins with the states of the active prompt's embeddings."""
        if not self._active or self._form(self._active[-1]).embeds is None:
            return self._inner(*args, **kwargs)
        return super()._around(*args, **kwargs)

    def _length_cut(self, form: PromptForm, name: str) -> int:
        """Returns 0: the decoder attends to the prompt's states, so none are cut off."""
        return 0

    def _around_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder with masks that include the active prompt."""
        if not self._active:
            return self._decode(*args, **kwargs)
        name = self._active[-1]
        form, inputs = self._form(name), {**dict(zip(self._decoder_takes, args, strict=False)), **kwargs}
        if form.embeds is None:
            return self._with_prefix(inputs, form, name)
        states, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
        if mask is not None and states is not None:
            if mask.ndim != 2 or mask.shape[1] + form.length != states.shape[1]:
                raise Unsupported(
                    "these states of the encoder were made without the prompt",
                    where=PROMPT,
                    found=tuple(mask.shape),
                    expected=(states.shape[0], states.shape[1] - form.length),
                    remedy="give the model its token ids and their mask, not an encoder's output",
                )
            inputs["encoder_attention_mask"] = _longer(mask, form.length)
        return self._decode(**inputs)

    def _with_prefix(self, inputs: dict[str, Any], form: PromptForm, name: str) -> Any:
        """Runs the decoder with the prompt's keys and values at the start of its self-attention cache."""
        given = [inputs.pop(name) for name in CACHES if name in inputs]
        cache = next((each for each in given if each is not None), None)
        if cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if not isinstance(cache, EncoderDecoderCache):
            raise Unsupported(
                "a prompt needs a cache that grows",
                where=PROMPT,
                expected=EncoderDecoderCache.__name__,
                found=type(cache).__name__,
            )
        own = cache.self_attention_cache
        if not own.get_seq_length():
            self._fill(own, form, inputs)
            setattr(cache, OWNER, name)
        elif getattr(cache, OWNER, None) != name:
            raise Unsupported(
                "this cache was filled without the prompt, which cannot be put before it any more",
                where=PROMPT,
                found=name,
                remedy="begin with an empty cache",
            )
        if (mask := inputs.get("attention_mask")) is not None:
            inputs["attention_mask"] = _longer(mask, form.length)
        return self._decode(**{**inputs, self._decoder_cache: cache})

    def _fill(self, own: Any, form: PromptForm, inputs: dict[str, Any]) -> None:
        """Puts the prompt's keys and values into an empty cache, for each row of the batch."""
        ids = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        weight, prompt = self._base.weight, form.cache
        assert prompt is not None
        assert ids is not None
        assert isinstance(weight, torch.Tensor)
        for layer, (keys, values) in enumerate(prompt.to(weight.dtype)):
            own.update(keys.expand(len(ids), *keys.shape), values.expand(len(ids), *values.shape), layer)

    def _prefill(self, ids: Sequence[int]) -> np.ndarray:
        raise Unsupported(
            "an encoder and decoder has no cache of a text that a prompt could begin with",
            where=PROMPT,
            found=type(self._trunk).__name__,
            remedy="choose another init",
        )


def _longer(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Extends a mask on the left by ``count`` visible positions."""
    return torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
