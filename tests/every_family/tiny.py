"""Makes the configuration of any type of transformers tiny, by the table of :mod:`.sizes`, so that every kind
of layer that it has occurs once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from adapterpack.tasks.task import Task

from .sizes import CONTEXT, CORRECTIONS, IDS, INDEXES, KINDS, LAYERS, LISTS, MOST_LAYERS, SMALL, WORDS

MOST_WEIGHTS = 4_000_000
"""A model with more was not made small: a field is missing in the table."""


def make_base(task: Task, kind: str, folder: Path, **fields: Any) -> Path:
    """A random checkpoint of a type in which nothing is zero or one: a lost bias or norm would not show.
    ``fields`` of its configuration are as they are given.

    Raises:
        AssertionError: the model is not small.
    """
    torch.manual_seed(5)
    config = tiny_config(kind, fields, decodes=task.name == "text-generation")
    if "image_features" in task.main.inputs:  # of which each takes many tokens
        config.get_text_config().max_position_embeddings = 4 * CONTEXT
    auto = getattr(transformers, task.auto_class)
    of = auto._model_mapping[type(config)]
    make = of[0]._from_config if isinstance(of, tuple) else auto.from_config  # of several classes the first
    model = make(config, dtype=torch.float32)
    if type(model.config) is not type(config):  # the language part of a whole, which is what a folder holds
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    count = sum(value.numel() for value in model.parameters())
    assert count <= MOST_WEIGHTS, f"{count} weights: {_large(config)}"
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder)
    return folder


def tiny_config(kind: str, fields: Mapping[str, Any] | None = None, *, decodes: bool = False) -> Any:
    """The small configuration of a type; one that can be a decoder or an encoder is a decoder if it
    ``decodes``.
    """
    fixed = {**CORRECTIONS.get(kind, {}), **(fields or {})}
    if decodes and "is_decoder" in _fields(transformers.CONFIG_MAPPING[kind]):
        fixed["is_decoder"] = True
    return _shrunk(transformers.CONFIG_MAPPING[kind], fixed, {})


def _fields(config: type) -> dict[str, Any]:
    """The fields of a class of configurations, by each of their names."""
    found = {field.name: field for field in dataclasses.fields(config) if field.init}
    others = getattr(config, "attribute_map", {}).items()
    return found | {real: found[alias] for alias, real in others if alias in found}


def _shrunk(
    config: type, fixed: Mapping[str, Any], ids: dict[str, int], given: Mapping[str, Any] | None = None
) -> Any:
    """A small instance of a class of configurations; ``given`` are the values that it has as a nested one."""
    try:
        default = config(**(given or {}))
    except Exception:  # the defaults are refused
        default = config(**{**(given or {}), **fixed})
    default.allow_global_per_layer_attribute_access = True
    known, chosen = _fields(config), dict[str, Any]()
    for name, value in default.to_dict().items():
        inner = getattr(default, name, None)
        if isinstance(inner, transformers.PreTrainedConfig) and "model_type" not in fixed.get(name, {}):
            nested = {key: one for key, one in inner.to_dict().items() if key in _set_by(inner)}
            small = _shrunk(type(inner), fixed.get(name, {}), ids, nested)
            chosen[name] = small.to_dict()
        elif name in known:
            small = _small(name, value, ids)
            if small != value:
                chosen[name] = small
    if default.is_encoder_decoder and getattr(default, "decoder_start_token_id", None) is None:
        chosen["decoder_start_token_id"] = IDS["decoder_start_token_id"]
    chosen |= _layers(default, known)
    if "head_dim" in known and default.head_dim is None:
        chosen["head_dim"] = SMALL["head_dim"]
    heads, pairs = (getattr(default, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(pairs, int) and isinstance(heads, int) and "num_key_value_heads" in known:
        chosen["num_key_value_heads"] = (
            1 if pairs == 1 else SMALL["num_attention_heads"] // (1 if pairs == heads else 2)
        )
    own = {
        name: value
        for name, value in fixed.items()
        if not isinstance(value, Mapping) or name not in chosen or "model_type" in value
    }
    return config(**{**(given or {}), **chosen, **own})


def _set_by(config: Any) -> set[str]:
    """The fields of a nested configuration in which it differs from the defaults of its class."""
    usual = type(config)().to_dict()
    return {
        name
        for name, value in config.to_dict().items()
        if name in _fields(type(config)) and usual.get(name) != value and name != "model_type"
    }


def _small(name: str, value: Any, ids: dict[str, int]) -> Any:
    """The small value of a field."""
    if name.endswith(("_token_id", "_token_index")) and (name in IDS or type(value) is int):
        none = value is None or (type(value) is int and value < 0)
        return value if none else _special(name, ids)
    if type(value) is int and name in SMALL:
        return min(value, SMALL[name])
    if isinstance(value, list | tuple) and name in LISTS and all(type(one) is int for one in value):
        return [min(one, LISTS[name]) for one in value]
    if name == "mrope_section":
        return [1, 1, SMALL["head_dim"] // 2 - 2]
    if isinstance(value, dict) and "rope" in name:
        return {key: _small(name if isinstance(one, dict) else key, one, ids) for key, one in value.items()}
    return value


def _special(name: str, ids: dict[str, int]) -> int:
    """The number of a special token, which is the same in nested configurations."""
    return IDS[name] if name in IDS else ids.setdefault(name.replace("_index", "_id"), WORDS - 1 - len(ids))


def _layers(default: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """How many layers there are, and what kinds: one of each kind of the whole model, in their order."""
    counts = {name: getattr(default, name) for name in LAYERS if type(getattr(default, name, None)) is int}
    count = counts.get("num_hidden_layers") or next(iter(counts.values()), 0)
    by_layer = {
        name: list(values)
        for name in dict.fromkeys((*KINDS, *known))
        if isinstance(values := getattr(default, name, None), list | tuple) and len(values) == count > 2
    }
    kept = _one_of_each(list(zip(*by_layer.values(), strict=True))) if by_layer else []
    if not kept:
        return {}
    chosen: dict[str, Any] = {
        name: _small(name, [values[place] for place in kept], {})
        for name, values in by_layer.items()
        if name in known
    }
    for name in INDEXES:
        if (
            isinstance(listed := getattr(default, name, None), list | tuple)
            and name in known
            and name not in by_layer
        ):
            chosen[name] = [new for new, old in enumerate(kept) if old in listed]
    return {**chosen, **{name: len(kept) for name in counts if counts[name] == count and name in known}}


def _one_of_each(kinds: Sequence[Any]) -> list[int]:
    """The numbers of the first layers of each kind, and at least two."""
    found = list({str(kind): place for place, kind in reversed(list(enumerate(kinds)))}.values())
    found = sorted(found)[:MOST_LAYERS]
    return found if len(found) > 1 else [0, 1]


def _large(config: Any) -> dict[str, Any]:
    """The fields that are left large."""
    flat = {}
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": one for key, one in value.items() if type(one) is int and one > 64}
        elif type(value) is int and value > 64:
            flat[name] = value
    return flat
