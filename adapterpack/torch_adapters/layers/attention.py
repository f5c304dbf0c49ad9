"""Wraps an attention module to add prompts to it (LLaMA-Adapter): virtual keys and values that its queries
attend to.

The prompt's attention is computed next to the base's own and added to its output, so the base's attention
kernel and its KV cache are unaffected.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapter_methods import Site, Traits
from ...adapter_methods.forms.attention import TRAITS, attend
from ...errors import Unsupported
from .block_targets import WORDS, select_blocks
from .calls import Args, Kwargs
from .layer import Adapted
from .weights import tensor_of
from .wrapper import Targets, innermost, module_at


class Projections(NamedTuple):
    """How an attention module computes queries, keys and values.

    ``parts`` names its linear layers. If ``joined``, the first gives queries, keys and values side by side.
    ``out`` names the output projection that the heads' result for a prompt passes through, None to add it as
    it is.
    """

    parts: tuple[str, ...]
    joined: bool
    out: str | None

    def queries(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        """Returns the queries ``[batch, length, heads * head_dim]`` of the input, with the adapters that are
        active inside the attention.
        """
        made = getattr(attention, self.parts[0])(hidden)
        return made.chunk(3, dim=-1)[0] if self.joined else made

    def keys_and_values(self, attention: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a prompt's keys and values ``[1, n, heads * head_dim]`` by the base's own layers, for a
        prompt ``[n, width]``.
        """
        if self.joined:
            _, keys, values = innermost(module_at(attention, self.parts[0]))(prompt[None]).chunk(3, dim=-1)
        else:
            keys, values = (innermost(module_at(attention, leaf))(prompt[None]) for leaf in self.parts[1:3])
        return keys, values

    def widths(self, attention: nn.Module) -> tuple[int, int, int] | None:
        """Returns the widths of the attention's input, queries and keys; None if it does not have exactly
        these layers.
        """
        layers = [
            innermost(getattr(attention, leaf))
            for leaf in self.parts
            if isinstance(getattr(attention, leaf, None), nn.Module)
        ]
        if len(layers) < len(self.parts):
            return None
        read, made = ("nx", "nf") if self.joined else ("in_features", "out_features")
        inputs, outputs = ([getattr(layer, side, 0) for layer in layers] for side in (read, made))
        if self.joined:
            return (inputs[0], inputs[1], inputs[1]) if outputs[0] == 3 * inputs[1] > 0 else None
        return (inputs[1], outputs[0], outputs[1]) if outputs[0] == inputs[3] else None


_PROJECTIONS = (
    Projections(("q_proj", "k_proj", "v_proj", "o_proj"), False, "o_proj"),
    Projections(("c_attn", "c_proj"), True, None),
)
"""Llama and its relatives, then GPT-2. PEFT skips GPT-2's output projection for prompts, so this does,
too.
"""


def _projections(attention: nn.Module) -> Projections | None:
    """Returns how this attention module projects, or None if that is unknown."""
    return next((one for one in _PROJECTIONS if one.widths(attention) is not None), None)


class AdaptedAttention(Adapted):
    """An attention module with named prompts, one of which can be active.

    Queries include the effect of other active adapters. A prompt's keys, values and output pass through the
    base's projections alone, so that the prompt means the same whichever other adapters are active.
    """

    def _run_active(self, args: Args, kwargs: Kwargs) -> Any:
        """Returns the attention's output with the active prompt's part added."""
        output = self._base(*args, **kwargs)
        hidden, _ = self._enter(args, kwargs)
        h = output[0] if isinstance(output, tuple) else output
        names = self._active if self._rows is not None else self._active[-1:]
        h = self._in_rows(hidden, h, partial(self._change, kwargs.get("position_embeddings")), names)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _change(self, places: Any, name: str, hidden: Tensor, h: Tensor, index: Tensor | None) -> Tensor:
        """Adds the prompt's part to the output ``h``; ``index`` are the batch rows that ``hidden`` and ``h``
        hold (None: all).
        """
        # Positions are the same for all rows, or given for each.
        if index is not None and places is not None:
            places = tuple(place if len(place) == 1 else place[index] for place in places)
        return h + self._held[name].weight * self._attend(name, hidden, places).to(h.dtype)

    def _attend(self, name: str, hidden: Tensor, places: Any) -> Tensor:
        """Computes what attending to the prompt adds to the output, for the input ``hidden``."""
        attention = innermost(self)
        projections = _projections(attention)
        assert projections is not None
        queries = _queries(attention, projections.queries(attention, hidden), places)
        # Compute the softmax in float32 or finer.
        dtype = torch.promote_types(queries.dtype, torch.float32)
        form = self._normal_form(name, dtype)
        made = projections.keys_and_values(attention, form.prompt.to(hidden.dtype))
        shape: Any = (-1, attention.head_dim)
        keys, values = (heads.unflatten(-1, shape) for heads in made)
        keys = _normalize(attention, "k_norm", keys)
        scale = float(getattr(attention, "scaling", None) or queries.shape[-1] ** -0.5)
        keys, values = (heads[0].transpose(0, 1).to(dtype) for heads in (keys, values))
        added = attend(form, queries.to(dtype), keys, values, scale).to(hidden.dtype)
        if projections.out is None:
            return added
        out = innermost(module_at(attention, projections.out))
        y = out(added)
        bias = tensor_of(out, "bias", self._site.path)
        # The layer's own output already includes the bias.
        return y if bias is None else y - bias


def _queries(attention: nn.Module, made: Tensor, places: Any) -> Tensor:
    """Returns the queries ``made`` as the attention uses them, ``[batch, heads, length, head_dim]``:
    normalised and rotated by position as the model does it.
    """
    made = made.unflatten(-1, (-1, attention.head_dim))  # type: ignore[arg-type]
    queries = _normalize(attention, "q_norm", made).transpose(1, 2)
    if places is None:
        return queries
    return _rotation(attention)(queries, queries, *places)[0]


def _normalize(attention: nn.Module, leaf: str, heads: Tensor) -> Tensor:
    """Applies the attention's norm ``leaf`` to its heads, if it has one."""
    norm: Any = getattr(attention, leaf, None)
    return heads if norm is None else norm(heads)


def _rotation(attention: nn.Module) -> Callable[..., Any]:
    """Returns the model's own ``apply_rotary_pos_emb``, from the Python module that defines this attention
    class.
    """
    function = getattr(inspect.getmodule(type(attention)), "apply_rotary_pos_emb", None)
    if function is None:
        raise Unsupported(
            "it is not known how this attention turns its queries by their positions",
            found=type(attention).__name__,
        )
    return function  # type: ignore[no-any-return]


def select_attention(
    model: nn.Module, targets: Targets, traits: Traits, exclude: tuple[str, ...] = ()
) -> list[Site]:
    """Returns the sites of the attention modules that ``targets`` names, in the model's order.

    Raises:
        SiteNotFound: a name matches nothing.
        Unsupported: a module is not an attention with linear layers of its own for queries, keys and values.
    """
    return [site_at(model, site.path) for site in select_blocks(model, targets, traits, exclude)]


def site_at(model: nn.Module, path: str) -> Site:
    """Returns the site of an attention module; its width is that of the input of the projections."""
    attention = innermost(module_at(model, path))
    projections = _projections(attention)
    width, queries, keys = (projections and projections.widths(attention)) or (0, 0, 0)
    norms = [
        getattr(attention, leaf).weight.shape
        for leaf in ("q_norm", "k_norm")
        if hasattr(getattr(attention, leaf, None), "weight")
    ]
    head_dim = getattr(attention, "head_dim", None)
    whole = isinstance(head_dim, int) and keys and keys % head_dim == 0 and queries % keys == 0
    if not whole or any(tuple(shape) != (head_dim,) for shape in norms):
        raise Unsupported(
            "a prompt cannot be added to this kind of attention",
            where=path,
            found=type(attention).__name__,
            expected="head_dim, and linear layers "
            + " or ".join(", ".join(one.parts) for one in _PROJECTIONS),
            remedy="use prefix_tuning",
        )
    return Site(path, width, width, "attention")


def last_layers(model: nn.Module, config: Any) -> Any:
    """Returns the config with the attention modules of the model's last ``adapter_layers`` layers as its
    targets.

    Raises:
        Unsupported: the model has fewer layers than the config names.
    """
    if not isinstance(config.targets, str) or config.targets not in WORDS:
        return dataclasses.replace(config, adapter_layers=0)
    paths = tuple(site.path for site in select_blocks(model, config.targets, TRAITS))
    count = config.adapter_layers or len(paths)
    if count > len(paths):
        raise Unsupported(
            "the model has fewer layers than are to be adapted",
            where="adapter_layers",
            expected=f"at most {len(paths)}",
            found=count,
        )
    return dataclasses.replace(config, targets=paths[-count:], adapter_layers=count)
