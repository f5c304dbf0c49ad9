"""Wraps the parts of a model that become graphs as torch modules with flat named tensors as inputs and
outputs.

Each wraps the task's whole model, so it includes every adapter, every head and every patch of an
architecture; the exporter drops what a part does not use. Caches are passed as the named tensors of each
layer, which :mod:`.layer_state` describes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import cached_property
from inspect import Parameter, signature
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from ...errors import Unsupported
from ...slots import LEAVES
from ...tasks import FRAMES, REREADS
from ...torch_adapters.canaries.inputs import features_of
from ...torch_adapters.layers.prompts import is_encoder, trunk_of
from .layer_state import LayerStates, make_cache, own_mask, pairs_cache, state_of
from .recurrences import as_operators

PREFIX = "inner."
"""The prefix of the paths of the model's modules inside a part."""

Named = dict[str, Tensor]


class TorchPart(nn.Module):
    """A part of a model; ``inner`` is the full model."""

    goes_on = True
    """Whether a decoder reads its new tokens alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model
        self.config = model.config
        self.takes = signature(model.forward).parameters
        # its name in newer and older versions of transformers
        self.cache = "cache" if "cache" in self.takes else "past_key_values"
        self.axes: dict[str, tuple[str | None, ...]] = {}
        """Axes of inputs that differ from the task's."""

    @cached_property
    def counts(self) -> bool:
        """Whether the model takes the positions of its tokens, or hands them on to the decoder inside it."""
        hands_on = any(one.kind is Parameter.VAR_KEYWORD for one in self.takes.values())
        inner = signature(self.inner.get_decoder().forward).parameters if hands_on else {}
        return "position_ids" in {*self.takes, *inner}

    def example_inputs(self, tensors: Named) -> Named:
        """Returns inputs of this part that it makes of the example's ``tensors``."""
        return {}

    def later_inputs(self, tensors: Named) -> Named:
        """Returns inputs of later parts that depend on what this one gave, which is among ``tensors``."""
        return {}


class Plain(TorchPart):
    """The full model; returns those of its outputs that are tensors."""

    def forward(self, **inputs: Tensor) -> Named:
        """Returns output name -> tensor."""
        with _before_tokens(trunk_of(self.inner), _slots(inputs)):
            return {name: value for name, value in self.inner(**inputs).items() if isinstance(value, Tensor)}


class Frames(Plain):
    """A model that answers for every frame of a sound."""

    def forward(self, **inputs: Tensor) -> Named:
        """Also returns how many frames of a row are its own by the model's own function, where a mask tells
        padding from sound.
        """
        named = super().forward(**inputs)
        mask = inputs.get("attention_mask")
        if mask is None:
            return named
        length_of = getattr(self.inner, "_get_feat_extract_output_lengths", None)
        length_of = length_of or self.inner._get_subsampling_output_length
        return {**named, FRAMES: length_of(mask.sum(-1)).to(torch.int64)[:, None]}


class CausalDecoder(TorchPart):
    """A causal language model on a cache."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: LayerStates,
    ) -> Named:
        """Returns the logits, and the cache extended by these tokens."""
        return self.run(attention_mask, position_ids, past_key_values, input_ids=input_ids)

    def run(
        self,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: LayerStates,
        **tokens: Tensor,
    ) -> Named:
        """Returns logits and cache for tokens given as ids or embeddings."""
        own = [] if self.cache not in self.takes else _foreign(self.takes[self.cache].annotation)
        if own or self.cache not in self.takes:
            raise Unsupported(
                "the model keeps what it has read in no cache of transformers, so no step can go on from it",
                found=", ".join(own) or type(self.inner).__name__,
                expected="an input `cache` or `past_key_values`",
            )
        cache = make_cache(self.inner, attention_mask, past)
        attention_mask = own_mask(cache, attention_mask, next(iter(tokens.values())).shape[1])
        # some models compute positions from the mask
        counted = {"position_ids": position_ids + first_position(self.inner)} if self.counts else {}
        with as_operators(self.inner, cache) if torch.compiler.is_exporting() else contextlib.nullcontext():
            output = self.inner(
                attention_mask=attention_mask, use_cache=True, **{self.cache: cache}, **counted, **tokens
            )
        return {"logits": output.logits, **_named("present", cache)}


class RereadingDecoder(CausalDecoder):
    """A causal language model whose steps read all tokens of a row again: these tokens are its cache."""

    goes_on = False

    def example_inputs(self, tensors: Named) -> Named:
        """Returns nothing more.

        Raises:
            Unsupported: what the model says of a token depends on later ones.
        """
        ids = tensors["input_ids"][:1]
        with torch.no_grad():
            whole, part = (self.inner(input_ids=one).logits for one in (ids, ids[:, :-1]))
        if (whole[:, :-1] - part).abs().max() > 1e-3 * part.abs().max():
            raise Unsupported(
                "a token's logits depend on the tokens behind it, so no token can be added to a row",
                found=type(self.inner).__name__,
                expected="a causal model",
            )
        return {}

    def run(
        self,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: LayerStates,
        **tokens: Tensor,
    ) -> Named:
        """Returns the logits of the new tokens, and as the key of one layer all tokens
        ``[batch, 1, total, 1]``. Padding is moved behind a row's tokens, which it then does not change.
        """
        ids = tokens["input_ids"]
        own = self.takes.keys() & {"use_cache"}
        ids = torch.cat([*(layer["key"][:, 0, :, 0].to(ids.dtype) for layer in past), ids], 1)
        total = ids.shape[1]
        first = attention_mask.argmax(1, keepdim=True)
        places = torch.arange(total)[None] + first
        places = torch.where(places < total, places, places - total)
        output = self.inner(
            input_ids=ids.gather(1, places),
            attention_mask=attention_mask.gather(1, places),
            **dict.fromkeys(own, False),
        )
        back = torch.arange(total - tokens["input_ids"].shape[1], total)[None] - first
        return {
            "logits": output.logits.gather(
                1, _wide(torch.where(back < 0, back + total, back), output.logits)
            ),
            "present.0.key": ids[:, None, :, None].float(),
        }


def _foreign(annotation: object) -> list[str]:
    """Returns the classes of caches that an input takes and that a model defines from nothing (xLSTM)."""
    return [
        kind.__name__
        for kind in get_args(annotation)
        if isinstance(kind, type)
        and kind.__module__.startswith("transformers.models.")
        and not issubclass(kind, Cache)
    ]


class Encoder(TorchPart):
    """An encoder up to the keys and values for the decoder's cross-attention, which do not depend on the
    decoder's tokens.
    """

    def forward(self, **inputs: Tensor) -> Named:
        """Returns the keys and values ``encoder.<layer>.key`` ``[batch, heads, source, head_dim]``."""
        rows = next(iter(inputs.values())).shape[0]
        slots = _slots(inputs)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        start = torch.zeros((rows, 1), dtype=torch.int64)
        if slots:
            encoder = self.inner.get_encoder()
            with _before_tokens(encoder, slots, whole=True):
                inputs = {"encoder_outputs": BaseModelOutput(encoder(**inputs).last_hidden_state)}
        self.inner(**inputs, decoder_input_ids=start, use_cache=True, **{self.cache: cache})
        return _named("encoder", cache.cross_attention_cache)


class CrossDecoder(TorchPart):
    """A decoder that reads its own cache and an encoder's keys and values."""

    def forward(
        self,
        decoder_input_ids: Tensor,
        past_key_values: LayerStates,
        encoder: LayerStates,
        attention_mask: Tensor | None = None,
    ) -> Named:
        """Returns the logits, and the cache extended by these tokens; ``attention_mask`` masks the encoder's
        tokens.
        """
        cache = EncoderDecoderCache(pairs_cache(past_key_values), pairs_cache(encoder))
        key = encoder[0]["key"]
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        width = (getattr(self.config, "encoder", None) or self.config).hidden_size
        hidden = key.new_zeros((key.shape[0], key.shape[2], width))  # the model reads only its shape
        output = self.inner(
            encoder_outputs=BaseModelOutput(hidden),
            decoder_input_ids=decoder_input_ids,
            use_cache=True,
            **{self.cache: cache},
            **masked,
        )
        return {"logits": output.logits, **_named("present", cache.self_attention_cache)}


class TextTower(TorchPart):
    """The text encoder of a model with two towers."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Named:
        """Returns ``text_embeds`` ``[batch, width]`` of length 1."""
        return {
            "text_embeds": _unit(
                self.inner.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
            )
        }


class ImageTower(TorchPart):
    """The image encoder of a model with two towers."""

    def forward(self, pixel_values: Tensor) -> Named:
        """Returns ``image_embeds`` ``[batch, width]`` of length 1."""
        return {"image_embeds": _unit(self.inner.get_image_features(pixel_values=pixel_values))}


PARTS: dict[str, type[TorchPart]] = {
    "plain": Plain,
    "frames": Frames,
    "decoder": CausalDecoder,
    REREADS: RereadingDecoder,
    "encoder": Encoder,
    "cross_decoder": CrossDecoder,
    "text_tower": TextTower,
    "image_tower": ImageTower,
}
"""The ``form`` of a task's part -> the module."""


def first_position(model: nn.Module) -> int:
    """Returns the position of a row's first token: the tables of RoBERTa's kin have that of padding before
    it.
    """
    places = (
        module.padding_idx + 1
        for module in model.modules()
        if hasattr(module, "create_position_ids_from_input_ids") and hasattr(module, "padding_idx")
    )
    return next(places, 0)


def part_class(form: str) -> type[TorchPart]:
    """Returns the module class of a part's ``form``: one of :data:`PARTS`, or another package's as
    ``module:class``.
    """
    module, _, name = form.partition(":")
    return getattr(importlib.import_module(module), name) if name else PARTS[form]


def _slots(inputs: Named) -> Named:
    """Removes the virtual tokens from the inputs and returns them."""
    return {name: inputs.pop(name) for name in LEAVES if name in inputs}


@contextlib.contextmanager
def _before_tokens(trunk: PreTrainedModel, slots: Named, whole: bool = False) -> Iterator[None]:
    """Makes a trunk run with virtual tokens before its own inside the block, as
    :mod:`adapterpack.slots.prompt_rows` describes; does nothing without virtual tokens. The trunk outputs its
    own tokens, or with ``whole`` all of them.

    A row is its prompt, its own tokens, and padding up to the longest prompt, so that its positions are the
    same as when the row runs alone.
    """
    if not slots:
        yield
        return
    count = slots["virtual_here"].to(torch.int64).sum(1, keepdim=True)
    inner = trunk.forward
    takes = tuple(signature(type(trunk).forward).parameters)[1:]

    def around(*args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(takes, args, strict=False)), **kwargs}
        own = trunk.get_input_embeddings()(inputs.pop("input_ids"))
        room = slots["virtual"].shape[1]
        length = own.shape[1]
        place = torch.arange(room + length)[None]
        behind = torch.where(place - count < length, place - count + room, place - length)
        places = torch.where(place < count, place, behind)

        def row(virtual: Tensor, tokens: Tensor) -> Tensor:
            return torch.cat([virtual.to(tokens.dtype), tokens], 1).gather(1, _wide(places, tokens))

        inputs["inputs_embeds"] = row(slots["virtual"], own)
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = row(slots["virtual_here"], inputs["attention_mask"])
        if inputs.get("token_type_ids") is not None:
            inputs["token_type_ids"] = row(torch.zeros_like(slots["virtual_here"]), inputs["token_type_ids"])
        output = inner(**inputs)
        if whole:
            return output
        cut = slots["virtual_cut"].to(torch.int64).sum(1, keepdim=True) if is_encoder(trunk) else count
        kept = cut + torch.arange(length)[None]
        hidden = output.last_hidden_state
        output["last_hidden_state"] = hidden = hidden.gather(1, _wide(kept, hidden))
        if output.get("pooler_output") is not None:
            output["pooler_output"] = trunk.pooler(hidden)
        return output

    trunk.forward = around
    try:
        yield
    finally:
        del trunk.forward


def _wide(places: Tensor, tokens: Tensor) -> Tensor:
    """Adds the last axis of the gathered tensor, if it has one, to places ``[batch, n]``."""
    return places if tokens.ndim == 2 else places[..., None].expand(-1, -1, tokens.shape[-1])


def _named(family: str, cache: DynamicCache) -> Named:
    return {
        f"{family}.{number}.{name}": value
        for number, tensors in enumerate(state_of(cache))
        for name, value in tensors.items()
    }


def _unit(output: Tensor | BaseModelOutputWithPooling) -> Tensor:
    features = features_of(output)
    return features / features.norm(p=2, dim=-1, keepdim=True)
