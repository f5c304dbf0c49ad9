"""Gives each row of a batch the rotary frequencies for its own length, in models with LongRoPE.

LongRoPE (https://arxiv.org/abs/2402.13753) has one set of frequencies for rows of up to
``original_max_position_embeddings`` tokens and another for longer ones. transformers chooses one set for a
whole batch, by its longest row, so that a row's result would depend on the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_KIND = "longrope"


class RowFrequencies(nn.Module):
    """A rotary embedding with both sets of frequencies: ``short`` is the original module, ``long`` a copy for
    longer rows.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.short = rotary
        self.long = copy.deepcopy(rotary)
        self._limits: dict[str | None, int] = {}
        for kind, settings in _settings(rotary):
            name = "inv_freq" if kind is None else f"{kind}_inv_freq"
            original = getattr(rotary, f"original_{name}" if kind is None else f"{kind}_original_inv_freq")
            limit = self._limits[kind] = settings["original_max_position_embeddings"]
            longer, _ = ROPE_INIT_FUNCTIONS[_KIND](
                rotary.config, original.device, seq_len=limit + 1, layer_type=kind
            )
            # An earlier pass over a long row may have left the other set.
            getattr(self.short, name).copy_(original)
            getattr(self.long, name).copy_(longer)

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines for positions ``[batch, sequence]``, each row with the set that it would
        have alone.
        """
        # The forward without its decorator, which chooses one set for all rows.
        plain = type(self.short).forward.__wrapped__
        kind = {} if layer_type is None else {"layer_type": layer_type}
        near: tuple[Tensor, Tensor] = plain(self.short, x, position_ids, **kind)
        limit = self._limits.get(layer_type)
        if limit is None:
            return near
        far = plain(self.long, x, position_ids, **kind)
        # Compute both sets and choose per token: data-dependent branches would not compile or export.
        is_long = (_last_positions(position_ids) >= limit)[..., None]
        return torch.where(is_long, far[0], near[0]), torch.where(is_long, far[1], near[1])


def separate_rows(model: nn.Module) -> None:
    """Makes the rows of a batch independent of each other's lengths, in place; other models are unchanged."""
    for owner, leaf, rotary in _find(model):
        if not isinstance(rotary, RowFrequencies):
            owner._modules[leaf] = RowFrequencies(rotary)
            owner.register_forward_pre_hook(_count_positions, with_kwargs=True)


def rejoin_rows(model: nn.Module) -> None:
    """Undoes :func:`separate_rows`."""
    for owner, leaf, rotary in _find(model):
        if isinstance(rotary, RowFrequencies):
            owner._modules[leaf] = rotary.short
            for number, hook in list(owner._forward_pre_hooks.items()):
                if hook is _count_positions:
                    del owner._forward_pre_hooks[number], owner._forward_pre_hooks_with_kwargs[number]


def hold_frequencies(model: nn.Module) -> None:
    """Makes dynamic NTK scaling keep its frequencies within the model's context, in place.

    Beyond the context they would change with the longest row, and sessions refuse such rows.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", ())
        dynamic = any(
            "dynamic" in kind
            for kind in ([kinds] if isinstance(kinds, str) else kinds.values() if kinds else ())
        )
        plain = getattr(type(module).forward, "__wrapped__", None)
        if dynamic and plain is not None:
            module.forward = MethodType(plain, module)


def _find(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yields the rotary embeddings with LongRoPE, wrapped or not: the module that contains each, its name
    there, and the embedding.
    """
    for owner in list(model.modules()):
        if not isinstance(owner, RowFrequencies):
            for leaf, child in list(owner.named_children()):
                if isinstance(child, RowFrequencies) or any(_settings(child)):
                    yield owner, leaf, child


def _settings(rotary: nn.Module) -> list[tuple[str | None, Mapping[str, Any]]]:
    """Returns the parameters of a LongRoPE module, by the kind of layers if it serves several kinds."""
    kinds = getattr(rotary, "rope_type", None)
    config = getattr(rotary, "config", None)
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping) or not hasattr(type(rotary).forward, "__wrapped__"):
        return []
    if isinstance(kinds, Mapping):
        return [(kind, parameters[kind]) for kind, rope_type in kinds.items() if rope_type == _KIND]
    return [(None, parameters)] if kinds == _KIND else []


def _last_positions(position_ids: Tensor) -> Tensor:
    """Returns the last position of the row that each token belongs to; packed rows restart at 0, so each has
    its own last position.
    """
    # Exported graphs have no packed rows.
    if torch.compiler.is_exporting():
        return position_ids.amax(-1, keepdim=True)
    rows = (position_ids == 0).cumsum(-1)
    last = torch.zeros(
        (*rows.shape[:-1], rows.shape[-1] + 1), dtype=position_ids.dtype, device=position_ids.device
    )
    return last.scatter_reduce(-1, rows, position_ids, "amax").gather(-1, rows)


def _count_positions(
    module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Computes position ids from each row's own mask if the caller gives none, as a pre-forward hook: the
    model would count padding.
    """
    mask = inputs.get("attention_mask")
    if inputs.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    tokens = next(
        (
            value
            for value in (*args, inputs.get("input_ids"), inputs.get("inputs_embeds"))
            if value is not None
        ),
        None,
    )
    if tokens is None:
        return None
    return args, {**inputs, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]}
