"""Puts prompts into a model: virtual tokens that only its trunk sees.

The adapters live in a wrapper around the input embedding; the trunk's ``forward`` is led through
:meth:`Prompts._around` as long as there is one. Callers count the model's own tokens only: masks, position
ids, labels and outputs are as long as they are without a prompt. A cache holds the virtual tokens from the
first pass on, and remembers whose they are.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ...adapter_methods import PROMPT, Site, Traits
from ...adapter_methods.forms.prompt import PromptForm
from ...adapter_methods.forms.prompt_config import PromptSite
from ...errors import BaseMismatch, Unsupported
from ..models.load import load_tokenizer
from .active import evaluating
from .layer import Adapted, NewAdapter
from .tensors import as_numpy
from .weights import device_of
from .wrapper import base_modules

CACHES = ("cache", "past_key_values")
"""What a trunk calls its cache, in newer and older versions of transformers."""
OWNER = "_adapterpack_prompt"
"""The attribute of a cache that says whose virtual tokens are in it."""


class Prompts(Adapted):
    """The input embedding, with any number of named prompts for the trunk above it, of which one is active at
    a time.
    """

    _whole_batch = "a prompt is tokens of its own, of which all rows of a batch have as many"

    def __init__(self, embedding: nn.Module, model: PreTrainedModel) -> None:
        self._trunk_in_tuple = (self._trunk_of(model),)  # a tuple: it is no part of this module
        trunk, config = self._trunk_in_tuple[0], model.config.get_text_config()
        super().__init__(embedding, Site(PROMPT, 0, 0, "prompt"))
        vocabulary, width = embedding.weight.shape  # type: ignore[misc, operator]
        heads = config.num_attention_heads
        self._site = PromptSite(
            PROMPT,
            int(width),
            0,
            "prompt",
            layers=config.num_hidden_layers,
            heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=int(vocabulary),
            embed=self._embed,
            prefill=self._prefill,
        )
        self._takes = tuple(inspect.signature(type(trunk).forward).parameters)[1:]
        self._cache_name = next((name for name in CACHES if name in self._takes), "")
        self._inner = trunk.forward
        self._redirected = False
        self._prompt_states: torch.Tensor | None = None

    @staticmethod
    def _trunk_of(model: PreTrainedModel) -> PreTrainedModel:
        return trunk_of(model)

    @property
    def _trunk(self) -> PreTrainedModel:
        """The model without its heads."""
        return self._trunk_in_tuple[0]

    @property
    def _is_encoder(self) -> bool:
        return is_encoder(self._trunk)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The embeddings of the model's own tokens."""
        return self._base(*args, **kwargs)

    def _add(self, name: str, adapter: NewAdapter) -> None:
        """Add a prompt; the first one leads the trunk through here."""
        super()._add(name, adapter)
        self._require_fit(name)
        if not self._redirected:
            self._inner, self._redirected = self._trunk.forward, True
            self._trunk.forward = self._around

    def _remove(self, name: str) -> None:
        """Remove a prompt; after the last one the trunk is as it was."""
        super()._remove(name)
        if self._redirected and not self._names and self._trunk.forward == self._around:
            self._redirected = False
            del self._trunk.forward
            if self._trunk.forward != self._inner:  # somebody had put one of their own there
                self._trunk.forward = self._inner

    def _form(self, name: str) -> PromptForm:
        """The normal form of a prompt, in float32 and with gradients."""
        method, cfg = self._methods[name]
        form: PromptForm = method.normal_form(cfg, self._tensors(name, torch.float32), self._site)
        return form

    def _require_fit(self, name: str) -> None:
        cache, site = self._form(name).cache, self._site
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
        """The trunk's output at its own tokens, with the active prompt before them."""
        if not self._active:
            return self._inner(*args, **kwargs)
        name = self._active[-1]
        inputs = {**dict(zip(self._takes, args, strict=False)), **kwargs}
        for name_in_call in CACHES if self._cache_name else ():
            if name_in_call in inputs:
                inputs[self._cache_name] = inputs.pop(name_in_call)
        tasks, as_dict = inputs.pop("task_ids", None), inputs.pop("return_dict", None)
        form = self._form(name)
        past = _length(inputs.get(self._cache_name), name)
        wants_cache = inputs.get("use_cache") is not False or inputs.get(self._cache_name) is not None
        self._count(inputs, form.length, past, shown=form.embeds is not None and not past)
        if not past:
            inputs = (
                self._with_embeds(inputs, form, tasks)
                if form.embeds is not None
                else self._with_cache(inputs, form)
            )
        output = self._inner(**inputs, return_dict=True)
        cut = self._length_cut(form, name) if form.embeds is not None and not past else 0
        # for the loss on the prompt itself (hooks.context)
        if self.training and cut and getattr(self._methods[name][1], "learnt", ()):
            self._prompt_states = output.last_hidden_state[:, :cut]
        output = self._without_prompt(output, cut, wants_cache, name)
        plain = as_dict is False or (as_dict is None and not getattr(self._trunk.config, "return_dict", True))
        return output.to_tuple() if plain else output

    def _length_cut(self, form: PromptForm, name: str) -> int:
        """How many states at the beginning of the trunk's output are left out: those of the prompt, unless
        they are pooled.
        """
        return (
            0
            if self._is_encoder and getattr(self._methods[name][1], "pooled", None) == "prompt"
            else form.length
        )

    def _count(self, inputs: dict[str, Any], extra: int, past: int, shown: bool) -> None:
        """Lets mask, positions and token types count ``extra`` virtual tokens; ``shown``: they are among this
        pass's inputs.
        """
        ids = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        batch, length = ids.shape[:2]  # type: ignore[union-attr]
        mask, places, kinds = (
            inputs.get("attention_mask"),
            inputs.get("position_ids"),
            inputs.get("token_type_ids"),
        )
        covered = (past or extra) + length - extra
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.shape != (batch, covered):
                shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise Unsupported(
                    "this attention mask cannot be made to cover a prompt",
                    where=PROMPT,
                    found=shape,
                    expected=(batch, covered),
                    remedy="give a mask [batch, tokens] of the model's own tokens and the cache's",
                )
            inputs["attention_mask"] = mask = torch.cat([mask.new_ones(batch, extra), mask], dim=1)
        if places is not None:
            first = torch.arange(extra, device=places.device).expand(*places.shape[:-1], extra)
            inputs["position_ids"] = torch.cat([first, places + extra], dim=-1) if shown else places + extra
        # else padding on the left would come between the prompt and the text
        elif mask is not None and not self._is_encoder:
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[
                :, -(length + (extra if shown else 0)) :
            ]
        if kinds is not None and shown:
            inputs["token_type_ids"] = torch.cat([kinds.new_zeros(kinds.shape[0], extra), kinds], dim=1)

    def _with_embeds(self, inputs: dict[str, Any], form: PromptForm, tasks: Any) -> dict[str, Any]:
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = self._trunk.get_input_embeddings()(inputs["input_ids"])
        prompt = form.embeds
        assert prompt is not None
        if prompt.ndim == 3:
            prompt = prompt[form.task] if tasks is None else prompt[tasks]
        before = prompt.to(embeds.dtype).expand(embeds.shape[0], form.length, embeds.shape[2])
        return {**inputs, "input_ids": None, "inputs_embeds": torch.cat([before, embeds], dim=1)}

    def _with_cache(self, inputs: dict[str, Any], form: PromptForm) -> dict[str, Any]:
        if not self._cache_name:
            raise Unsupported(
                "this model takes no cache, so keys and values cannot go before its tokens",
                where=PROMPT,
                found=type(self._trunk).__name__,
                remedy="use a method of virtual embeddings, such as prompt_tuning",
            )
        again = any(getattr(module, "gradient_checkpointing", False) for module in self._trunk.modules())
        if again and self.training and torch.is_grad_enabled():
            raise Unsupported(
                "gradient checkpointing drops the cache, and with it the prompt",
                where=PROMPT,
                remedy="switch it off, or use a method of virtual embeddings, such as prompt_tuning",
            )
        ids = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        batch, prompt = ids.shape[0], form.cache  # type: ignore[union-attr]
        assert prompt is not None
        device = prompt.device.type
        weight = self._base.weight
        assert isinstance(weight, torch.Tensor)
        prompt = prompt.to(
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        cache = inputs.get(self._cache_name)
        if cache is None:
            cache = DynamicCache(config=self._trunk.config)
        for layer, (keys, values) in enumerate(prompt):
            cache.update(keys.expand(batch, *keys.shape), values.expand(batch, *values.shape), layer)
        return {**inputs, self._cache_name: cache}

    def _without_prompt(self, output: Any, cut: int, wants_cache: bool, name: str) -> Any:
        """The output at the model's own tokens; an encoder's pooled output is made again from its own first
        token.
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
        """The embeddings of ids by the model itself, ``[n, width]``."""
        with torch.no_grad():
            return as_numpy(
                self._trunk.get_input_embeddings()(torch.tensor(ids, device=device_of(self._base, PROMPT)))
            )

    def _prefill(self, ids: Sequence[int]) -> np.ndarray:
        """What the base, without any adapter, puts into its cache for ids: ``[layers, 2, heads, n,
        head_dim]``.
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
            self._inner(input_ids=row, **{self._cache_name: cache}, use_cache=True)
        return np.stack(
            [np.stack([as_numpy(layer.keys[0]), as_numpy(layer.values[0])]) for layer in cache.layers]
        )


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model, of one that has no encoder and decoder, before whose tokens a prompt goes."""
    # which some heads (OPT's) call past the model around it
    inner = getattr(model.base_model, "decoder", None)
    return inner if isinstance(inner, PreTrainedModel) else model.base_model


def is_encoder(trunk: nn.Module) -> bool:
    """Whether a trunk numbers positions in an embedding module of its own, where they may begin anywhere."""
    return (
        hasattr(trunk, "embeddings")
        or "position_ids" not in inspect.signature(type(trunk).forward).parameters
    )


def _length(cache: Any, name: str) -> int:
    """How much a cache holds, if the prompt can be in it."""
    if cache is None:
        return 0
    if not isinstance(cache, DynamicCache):
        raise Unsupported(
            "a prompt needs a cache that grows",
            where=PROMPT,
            expected=DynamicCache.__name__,
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


def select(
    model: nn.Module, targets: str | tuple[str, ...], traits: Traits, exclude: tuple[str, ...] = ()
) -> list[Site]:
    """The one site of a prompt.

    Raises:
        Unsupported: the model is none of transformers, or is to train its input embedding whole.
    """
    embedding_modules = {module for _, module in base_modules(of_transformers(model).get_input_embeddings())}
    inside = [path for path, module in base_modules(model) if module in embedding_modules]
    for path in exclude:
        if any(table == path or table.startswith(f"{path}.") for table in inside):
            raise Unsupported(
                "a prompt and the whole input embedding cannot be trained together",
                where=path,
                remedy="take it out of modules_to_save",
            )
    return [Site(PROMPT, 0, 0, "prompt")]


def embedding(model: nn.Module, path: str) -> nn.Module:
    """What stands in the place of the model's input embedding."""
    return of_transformers(model).get_input_embeddings()  # type: ignore[no-any-return]


def of_transformers(model: nn.Module) -> PreTrainedModel:
    """The model itself, if it is one of transformers.

    Raises:
        Unsupported: it is not.
    """
    if not isinstance(model, PreTrainedModel):
        raise Unsupported("a prompt needs a model of transformers", where=PROMPT, found=type(model).__name__)
    return model


def ready(model: nn.Module, config: Any) -> Any:
    """The config with the ids of its text, by the tokenizer that came with the model.

    Raises:
        Unsupported: the model came from no folder that could hold one.
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
