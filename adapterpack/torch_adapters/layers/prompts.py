"""Adds prompts to a model: virtual tokens, as embeddings or as keys and values, that only its trunk sees.

The adapters are held by a wrapper around the input embedding. While there is one, the trunk's ``forward`` is
replaced by :meth:`Prompts._around`. Callers count the model's own tokens only: masks, position ids, labels
and outputs have the lengths that they have without a prompt. A KV cache contains the virtual tokens from the
first pass on, and records which adapter they belong to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ...adapter_methods import PROMPT, PromptForm, Site, Traits
from ...adapter_methods.forms.prompt import PromptSite
from ...errors import BaseMismatch, Unsupported
from ..models.load import load_tokenizer
from .active import evaluating
from .calls import Args, Kwargs, argument_names, named_arguments
from .layer import Adapted, NewAdapter
from .tensors import as_numpy
from .weights import device_of
from .wrapper import Targets, is_inside, paths_of

CACHES = ("cache", "past_key_values")
"""The names of a trunk's cache argument in newer and older versions of transformers."""
OWNER = "_adapterpack_prompt"
"""The attribute of a cache that names the adapter whose virtual tokens are in it."""


class Redirect:
    """Replaces the ``forward`` of a module for a while, and keeps the one that it had."""

    def __init__(self, module: PreTrainedModel, around: Callable[..., Any]) -> None:
        self.module = module
        self.inner = module.forward
        self._around = around
        self._begun = False

    def begin(self) -> None:
        """Replaces the module's ``forward``."""
        if not self._begun:
            self.inner = self.module.forward
            self.module.forward = self._around
            self._begun = True

    def end(self) -> None:
        """Restores the module's ``forward``, unless someone else has replaced it since."""
        if self._begun and self.module.forward == self._around:
            self._begun = False
            del self.module.forward
            # Someone else had replaced ``forward`` before; restore theirs.
            if self.module.forward != self.inner:
                self.module.forward = self.inner


class Prompts(Adapted):
    """The input embedding, with named prompts for the trunk above it, one of which can be active."""

    _whole_batch = "a prompt is tokens of its own, of which all rows of a batch have as many"

    def __init__(self, embedding: nn.Module, model: PreTrainedModel) -> None:
        super().__init__(embedding, Site(PROMPT, 0, 0, "prompt"))
        vocabulary, width = embedding.weight.shape  # type: ignore[misc, operator]
        self._site = PromptSite(
            PROMPT,
            int(width),
            0,
            "prompt",
            **self._sizes(model.config),
            vocabulary=int(vocabulary),
            embed=self._embed,
            prefill=self._prefill,
        )
        self._redirect = Redirect(self._trunk_of(model), self._around)
        self._cache_name = next((name for name in CACHES if name in argument_names(self._trunk)), "")
        self._prompt_states: Tensor | None = None

    @staticmethod
    def _trunk_of(model: PreTrainedModel) -> PreTrainedModel:
        return trunk_of(model)

    @staticmethod
    def _sizes(config: Any) -> dict[str, Any]:
        """Returns the sizes of the keys and values that a prompt may consist of."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        return {
            "layers": config.num_hidden_layers,
            "heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        }

    @property
    def _trunk(self) -> PreTrainedModel:
        """The model without its heads."""
        return self._redirect.module

    def _run_active(self, args: Args, kwargs: Kwargs) -> Any:
        """Returns the embeddings of the model's own tokens."""
        return self._base(*args, **kwargs)

    def _add(self, name: str, adapter: NewAdapter) -> None:
        """Adds a prompt; the first one redirects the trunk's ``forward`` to this wrapper."""
        super()._add(name, adapter)
        self._require_fit(name)
        self._redirect.begin()

    def _remove(self, name: str) -> None:
        """Removes a prompt; the last one restores the trunk's ``forward``."""
        super()._remove(name)
        if not self._names:
            self._redirect.end()

    def _form(self, name: str) -> PromptForm:
        """Returns the normal form of a prompt, in float32 and with gradients."""
        form: PromptForm = self._normal_form(name, torch.float32)
        return form

    def _require_fit(self, name: str) -> None:
        """Raises if a prompt's keys and values do not have the sizes of this model's."""
        cache = self._form(name).cache
        site = self._site
        assert isinstance(site, PromptSite)
        wanted = (site.layers, 2, site.heads, site.head_dim)
        sizes = wanted if cache is None else (*cache.shape[:3], cache.shape[4])
        if sizes != wanted:
            raise BaseMismatch(
                "this prompt was made for a model of other sizes",
                where=PROMPT,
                expected=wanted,
                found=sizes,
                remedy="use the base that the pack names",
            )

    def _around(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the trunk with the active prompt before its tokens, and returns the output at its own
        tokens.
        """
        if not self._active:
            return self._redirect.inner(*args, **kwargs)
        name = self._active[-1]
        inputs = named_arguments(self._trunk, args, kwargs)
        for name_in_call in CACHES if self._cache_name else ():
            if name_in_call in inputs:
                inputs[self._cache_name] = inputs.pop(name_in_call)
        tasks = inputs.pop("task_ids", None)
        as_dict = inputs.pop("return_dict", None)
        form = self._form(name)
        past = cached_length(inputs.get(self._cache_name), name)
        wants_cache = inputs.get("use_cache") is not False or inputs.get(self._cache_name) is not None
        # Masks and positions cover the virtual tokens in every pass, but the tokens themselves enter only in
        # the first: later passes find them in the cache.
        self._count(inputs, form.length, past, shown=form.embeds is not None and not past)
        if not past:
            inputs = (
                self._with_embeds(inputs, form, tasks)
                if form.embeds is not None
                else self._with_cache(inputs, form)
            )
        output = self._redirect.inner(**inputs, return_dict=True)
        cut = self._length_cut(form, name) if form.embeds is not None and not past else 0
        # Kept for the loss on the prompt's own tokens (``hooks.context`` in training).
        if self.training and cut and getattr(self._held[name].config, "learnt", ()):
            self._prompt_states = output.last_hidden_state[:, :cut]
        output = self._without_prompt(output, cut, wants_cache, name)
        plain = as_dict is False or (as_dict is None and not getattr(self._trunk.config, "return_dict", True))
        return output.to_tuple() if plain else output

    def _length_cut(self, form: PromptForm, name: str) -> int:
        """Returns how many states to cut off the start of the trunk's output: the prompt's, unless they are
        to be pooled.
        """
        return (
            0
            if is_encoder(self._trunk) and getattr(self._held[name].config, "pooled", None) == "prompt"
            else form.length
        )

    def _count(self, inputs: Kwargs, extra: int, past: int, shown: bool) -> None:
        """Extends mask, positions and token types by ``extra`` virtual tokens.

        ``shown`` means that the virtual tokens are among this pass's inputs; otherwise they are in the cache.
        """
        batch, length = tokens_of(inputs).shape[:2]
        mask = inputs.get("attention_mask")
        places = inputs.get("position_ids")
        kinds = inputs.get("token_type_ids")
        covered = (past or extra) + length - extra
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != (batch, covered):
                shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise Unsupported(
                    "this attention mask cannot be made to cover a prompt",
                    where=PROMPT,
                    found=shape,
                    expected=(batch, covered),
                    remedy="give a mask [batch, tokens] of the model's own tokens and the cache's",
                )
            inputs["attention_mask"] = mask = with_room(mask, extra)
        if places is not None:
            first = torch.arange(extra, device=places.device).expand(*places.shape[:-1], extra)
            inputs["position_ids"] = torch.cat([first, places + extra], dim=-1) if shown else places + extra
        # Without explicit positions, the model would count left padding, and leave a gap between the prompt
        # and the text.
        elif mask is not None and not is_encoder(self._trunk):
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[
                :, -(length + (extra if shown else 0)) :
            ]
        if kinds is not None and shown:
            inputs["token_type_ids"] = with_room(kinds, extra, 0)

    def _with_embeds(self, inputs: Kwargs, form: PromptForm, tasks: Any) -> Kwargs:
        """Returns the inputs with the prompt's embeddings before those of the tokens."""
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = self._trunk.get_input_embeddings()(inputs["input_ids"])
        prompt = form.embeds
        assert prompt is not None
        if prompt.ndim == 3:
            prompt = prompt[form.task] if tasks is None else prompt[tasks]
        before = prompt.to(embeds.dtype).expand(embeds.shape[0], form.length, embeds.shape[2])
        return {**inputs, "input_ids": None, "inputs_embeds": torch.cat([before, embeds], dim=1)}

    def _with_cache(self, inputs: Kwargs, form: PromptForm) -> Kwargs:
        """Returns the inputs with a cache that contains the prompt's keys and values."""
        if not self._cache_name:
            raise Unsupported(
                "this model takes no cache, so keys and values cannot go before its tokens",
                where=PROMPT,
                found=type(self._trunk).__name__,
                remedy="use a method of virtual embeddings, such as prompt_tuning",
            )
        if runs_layers_again(self._trunk) and self.training and torch.is_grad_enabled():
            raise Unsupported(
                "gradient checkpointing drops the cache, and with it the prompt",
                where=PROMPT,
                remedy="switch it off, or use a method of virtual embeddings, such as prompt_tuning",
            )
        cache = inputs.get(self._cache_name)
        if cache is None:
            cache = DynamicCache(config=self._trunk.config)
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
            raise Unsupported(
                "a prompt sets keys and values, and layers of this model keep a recurrent state",
                where=PROMPT,
                found=type(self._trunk).__name__,
                remedy="use a method that changes weights, such as lora",
            )
        self._fill(cache, form, len(tokens_of(inputs)))
        return {**inputs, self._cache_name: cache}

    def _fill(self, cache: Any, form: PromptForm, batch: int) -> None:
        """Puts the prompt's keys and values into an empty cache, for each row of the batch."""
        prompt = form.cache
        weight = self._base.weight
        assert prompt is not None and isinstance(weight, Tensor)
        device = prompt.device.type
        prompt = prompt.to(
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        for layer, (keys, values) in enumerate(prompt):
            cache.update(keys.expand(batch, *keys.shape), values.expand(batch, *values.shape), layer)

    def _without_prompt(self, output: Any, cut: int, wants_cache: bool, name: str) -> Any:
        """Returns the output at the model's own tokens; an encoder's pooled output is computed again from its
        own first token.
        """
        parts = dict(output.items())
        if (cache := parts.get(self._cache_name)) is not None:
            setattr(cache, OWNER, name)
            if not wants_cache:
                del parts[self._cache_name]
        if cut:
            parts["last_hidden_state"] = parts["last_hidden_state"][:, cut:]
            if "hidden_states" in parts:
                parts["hidden_states"] = tuple(value[:, cut:] for value in parts["hidden_states"])
            if parts.get("pooler_output") is not None:
                parts["pooler_output"] = self._trunk.pooler(parts["last_hidden_state"])
        return type(output)(**parts)

    def _embed(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the model's embeddings of token ids, ``[n, width]``."""
        with torch.no_grad():
            return as_numpy(
                self._trunk.get_input_embeddings()(torch.tensor(ids, device=device_of(self._base, PROMPT)))
            )

    def _prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the keys and values that the base, without adapters, caches for token ids: ``[layers, 2,
        heads, n, head_dim]``.
        """
        if not self._cache_name:
            raise Unsupported(
                "this model has no cache to take keys and values from",
                where=PROMPT,
                found=type(self._trunk).__name__,
            )
        cache = DynamicCache(config=self._trunk.config)
        with evaluating(self._trunk, None), torch.no_grad():
            row = torch.tensor([list(ids)], device=device_of(self._base, PROMPT))
            self._redirect.inner(input_ids=row, **{self._cache_name: cache}, use_cache=True)
        return np.stack(
            [np.stack([as_numpy(layer.keys[0]), as_numpy(layer.values[0])]) for layer in cache.layers]
        )


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the part of a model that prompts go in front of; for models other than encoder-decoders."""
    # OPT's heads call this decoder directly and bypass the base model's forward.
    inner = getattr(model.base_model, "decoder", None)
    return inner if isinstance(inner, PreTrainedModel) else model.base_model


def is_encoder(trunk: nn.Module) -> bool:
    """Whether a trunk computes positions in an embedding module of its own, where they may start anywhere."""
    return hasattr(trunk, "embeddings") or "position_ids" not in argument_names(trunk)


def runs_layers_again(trunk: nn.Module) -> bool:
    """Whether gradient checkpointing is on, which runs layers again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in trunk.modules())


def tokens_of(inputs: Kwargs) -> Tensor:
    """Returns the token ids among the inputs of a pass, or the embeddings that are there instead."""
    return inputs["input_ids" if inputs.get("inputs_embeds") is None else "inputs_embeds"]


def with_room(mask: Tensor, count: int, value: int = 1) -> Tensor:
    """Extends a mask ``[batch, length]`` on the left by ``count`` positions of this value."""
    return torch.cat([mask.new_full((len(mask), count), value), mask], dim=1)


def cached_length(cache: Any, name: str, kind: type[Any] = DynamicCache) -> int:
    """Returns how many tokens a cache holds.

    Raises:
        Unsupported: it is of another kind, or holds tokens but not the prompt ``name``.
    """
    if cache is None:
        return 0
    if not isinstance(cache, kind):
        raise Unsupported(
            "a prompt needs a cache that grows",
            where=PROMPT,
            expected=kind.__name__,
            found=type(cache).__name__,
        )
    length = int(cache.get_seq_length())
    if length and getattr(cache, OWNER, None) != name:
        raise Unsupported(
            "this cache was filled without the prompt, which cannot be put before it any more",
            where=PROMPT,
            found=name,
            remedy="begin with an empty cache",
        )
    return length


def select(model: nn.Module, targets: Targets, traits: Traits, exclude: tuple[str, ...] = ()) -> list[Site]:
    """Returns the only site of a prompt.

    Raises:
        Unsupported: the model is not from transformers, or its input embedding is to be trained in full.
    """
    tables = paths_of(model, of_transformers(model).get_input_embeddings())
    for path in exclude:
        if any(is_inside(table, [path]) for table in tables):
            raise Unsupported(
                "a prompt and the whole input embedding cannot be trained together",
                where=path,
                remedy="take it out of modules_to_save",
            )
    return [Site(PROMPT, 0, 0, "prompt")]


def embedding(model: nn.Module, path: str) -> nn.Module:
    """Returns the model's input embedding, or the wrapper around it."""
    return of_transformers(model).get_input_embeddings()  # type: ignore[no-any-return]


def of_transformers(model: nn.Module) -> PreTrainedModel:
    """Returns the model itself if it is from transformers.

    Raises:
        Unsupported: it is not from transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise Unsupported("a prompt needs a model of transformers", where=PROMPT, found=type(model).__name__)
    return model


def ready(model: nn.Module, config: Any) -> Any:
    """Returns the config with the token ids of its initial text, by the tokenizer in the model's folder.

    Raises:
        Unsupported: the model was not loaded from a folder.
    """
    if config.text is None or config.token_ids:
        return config
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not source:
        raise Unsupported(
            "the model came from no folder, so its tokenizer is not known",
            where=PROMPT,
            remedy="give token_ids",
        )
    return dataclasses.replace(config, token_ids=tuple(load_tokenizer(source)(config.text)["input_ids"]))
