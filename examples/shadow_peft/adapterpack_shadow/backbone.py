"""Builds the second model of a shadow adapter: one of the base's class, with fewer or narrower layers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from adapterpack.errors import Unsupported
from adapterpack.torch_adapters.layers.tensors import as_numpy

from .method import BACKBONE, PROJECTION, Shadow

_SIZES = {
    "shadow_num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "shadow_hidden_size": ("hidden_size", "n_embd", "d_model"),
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "shadow_num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}
"""A size of the backbone -> what configurations call it; the first of the names that one has."""
_FREE = 64
"""How many layers a backbone may have, whatever the number of its tensors."""


def _config(trunk: PreTrainedModel, cfg: Shadow) -> Any:
    """The base's configuration with the sizes of the backbone, as PEFT makes it: what lists layer by layer is
    cut, or its last repeated.
    """
    config = copy.deepcopy(trunk.config)
    for field, names in _SIZES.items():
        value = getattr(cfg, field) or (1 if field == "shadow_num_hidden_layers" else None)
        if value is None:
            continue
        name = next((name for name in names if hasattr(config, name)), None)
        if name is None:
            raise Unsupported(
                "this model's configuration has no such size, so that none can mirror it",
                where=field,
                expected=", ".join(names),
                found=type(config).__name__,
            )
        setattr(config, name, value)
    count = cfg.shadow_num_hidden_layers or 1
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        kinds = list(kinds) or ["full_attention"]
        config.layer_types = (kinds + kinds[-1:] * count)[:count]
    if isinstance(windows := getattr(config, "max_window_layers", None), int):
        config.max_window_layers = min(windows, count)
    return config


def _width(config: Any) -> int:
    return int(next(getattr(config, name) for name in _SIZES["shadow_hidden_size"] if hasattr(config, name)))


def embeds_are_shared(trunk: PreTrainedModel, cfg: Shadow) -> bool:
    """Whether the backbone reads the base's embeddings, which it can if it is as wide."""
    takes = inspect.signature(type(trunk).forward).parameters
    same = cfg.shadow_hidden_size in (None, _width(trunk.config))
    return cfg.share_embeddings and same and "inputs_embeds" in takes


def shapes_of(
    trunk: PreTrainedModel, cfg: Shadow, width: int, tensors: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of what an adapter holds of its backbone, and of the projection to ``width``;
    nothing is allocated.

    ``tensors``: how many there are in a file, which has at least one for each layer.

    Raises:
        Unsupported: no such model can be built.
    """
    if tensors is not None and (cfg.shadow_num_hidden_layers or 1) > max(_FREE, tensors):
        raise Unsupported(
            "the second model has more layers than the adapter has tensors",
            where="shadow_num_hidden_layers",
            found=cfg.shadow_num_hidden_layers,
            expected=f"at most {max(_FREE, tensors)}",
        )
    try:
        with torch.device("meta"):
            model = type(trunk)(_config(trunk, cfg))
    except (ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError, AssertionError) as error:
        raise Unsupported(
            "no second model of these sizes can be built of this one",
            found=str(error)[:200],
            remedy="choose sizes that its attention's heads divide",
        ) from error
    shapes = {_name(key): tuple(value.shape) for key, value in _state(model, trunk, cfg).items()}
    own = _width(model.config)
    return shapes if own == width else {**shapes, f"{PROJECTION}_weight": (width, own)}


def built(trunk: PreTrainedModel, cfg: Shadow) -> nn.Module:
    """The backbone without its parameters, which are on the meta device; what it computes with besides
    (tables of positions) is there.
    """
    with torch.random.fork_rng(), init_empty_weights(include_buffers=False):
        model: nn.Module = type(trunk)(_config(trunk, cfg))
    return model.requires_grad_(False)


def drawn(trunk: PreTrainedModel, width: int, cfg: Shadow, seed: int) -> dict[str, np.ndarray]:
    """The tensors that an adapter begins with, as transformers draws those of a new model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = type(trunk)(_config(trunk, cfg))
        made = {_name(key): as_numpy(value) for key, value in _state(model, trunk, cfg).items()}
        own = _width(model.config)
        if own != width:
            made[f"{PROJECTION}_weight"] = as_numpy(nn.Linear(own, width, bias=False).weight)
    return {key: made[key] for key in sorted(made)}


def _state(model: nn.Module, trunk: PreTrainedModel, cfg: Shadow) -> dict[str, torch.Tensor]:
    """What a state dict holds of the backbone; without the embeddings that it does not read, where PEFT
    leaves them out.
    """
    leaves_out = embeds_are_shared(trunk, cfg)
    return {
        key: value
        for key, value in model.state_dict().items()
        if not (leaves_out and key.startswith("embed_tokens."))
    }


def _name(key: str) -> str:
    return f"{BACKBONE}_{key.replace('.', '/')}"
