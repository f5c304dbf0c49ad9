"""Reads off transformers what it renames when it loads a checkpoint: ``python tests/renamings.py`` prints
``renamings.json``.

Every class is built on torch's meta device, which costs no memory, with few layers; what cannot be built here
(a library is not installed) gets what its own class or type says, without its parts.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel, WeightConverter
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

_LAYERS = (
    "num_hidden_layers",
    "encoder_layers",
    "decoder_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "depth",
    "vision_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)
_SPECIAL = ("GroupWeightRename", "LayerPairCollapse", "Inkling2IndexOffsetWeightRename")
"""Classes of steps that are more than a pattern and a target."""


def written(transforms: list[Any]) -> list[list[str]]:
    """The steps that rename one tensor, each as pattern and target; what puts tensors together, or takes them
    apart, is left out.
    """
    return [
        _written(one)
        for one in transforms
        if not isinstance(one, WeightConverter) and type(one).__name__ not in _SPECIAL
    ]


def _written(transform: Any) -> list[str]:
    pattern, target = transform.compiled_sources.pattern, transform.target_patterns[0]
    for number in range(len(transform.source_patterns)):
        pattern = pattern.replace(f"(?P<g{number}>", "(?:", 1)
    if (
        len(transform.source_patterns) == 1
        and pattern.startswith("(?:")
        and pattern.endswith(")")
        and "|" not in pattern
    ):
        pattern = pattern[3:-1]
    return [pattern, target]


def parts_of(model: PreTrainedModel) -> list[list[str | None]]:
    """The parts of a model whose weights are renamed: scope, the class or type under which transformers says
    how, and the key of the configuration that may choose another model for that place.
    """
    keys = {
        id(getattr(model.config, key, None)): key
        for key, kind in (getattr(model.config, "sub_configs", None) or {}).items()
        if kind is AutoConfig
    }
    claimed: dict[str | None, list[str]] = {}
    parts: list[list[str | None]] = []

    def within(name: str, path: str) -> bool:
        return any(seen == "" or path.startswith(f"{seen}.") for seen in claimed.get(name, ()))

    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        name, kind = type(module).__name__, module.config.model_type
        key = keys.get(id(module.config)) if path else None
        if within(name, path):
            continue
        known = name if get_checkpoint_conversion_mapping(name) is not None else None
        if (
            known is None
            and kind
            and not within(kind, path)
            and get_checkpoint_conversion_mapping(kind) is not None
        ):
            known = kind
            claimed.setdefault(kind, []).append(path)
        if known is not None:
            claimed.setdefault(name, []).append(path)
        above = any(key == other for _, _, other in parts)
        if known is not None or (key and not above):
            parts.append(
                [
                    path.removeprefix(model.base_model_prefix).removeprefix(".") if path else None,
                    known,
                    None if above else key,
                ]
            )
    return parts


def built(name: str, config: Any) -> PreTrainedModel | None:
    """The model of a class on the meta device, or None where it cannot be built here."""
    for few in (True, False):
        try:
            made = config()
            if few:
                _shrink(made)
            with torch.device("meta"):
                model: PreTrainedModel = getattr(transformers, name)._from_config(made)
            return model
        except Exception:  # whatever a class raises on the defaults of its configuration
            continue
    return None


def _shrink(config: Any) -> None:
    for key in _LAYERS:
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, min(getattr(config, key), 2))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    for key in getattr(config, "sub_configs", None) or {}:
        if hasattr(getattr(config, key, None), "sub_configs"):
            _shrink(getattr(config, key))


def table() -> dict[str, Any]:
    """The whole table."""
    steps: dict[str, Any] = {}
    models: dict[str, Any] = {}
    types: dict[str, str] = {}

    def need(name: str | None) -> bool:
        if name is not None and name not in steps:
            steps[name] = written(get_checkpoint_conversion_mapping(name) or [])
        return name is not None and bool(steps[name])

    need("legacy")
    named = {
        kind: first for kind, first in modeling_auto.MODEL_MAPPING_NAMES.items() if isinstance(first, str)
    }
    types = {kind: name for kind, name in named.items() if need(name)}
    for kind in CONFIG_MAPPING_NAMES:
        for name, config in _classes(kind).items():
            model = built(name, config)
            own = next((one for one in (name, kind) if get_checkpoint_conversion_mapping(one)), None)
            parts = [[None, own, None]] if model is None else parts_of(model)
            used = [part for part in parts if part[2] or need(part[1])]
            if used:
                models[name] = ["" if model is None else model.base_model_prefix, used]
                models.setdefault(kind, name)
    steps = {name: value for name, value in steps.items() if value}
    return {
        "transformers": transformers.__version__,
        "known": sorted(CONFIG_MAPPING_NAMES),
        "types": types,
        "renamings": _once(steps),
        "models": _once(models),
    }


def _classes(kind: str) -> dict[str, Any]:
    """The public classes of models of that type, each with its configuration's; none where nothing of them is
    renamed.
    """
    first = modeling_auto.MODEL_MAPPING_NAMES.get(kind)
    owner = getattr(transformers, first if isinstance(first, str) else "", None)
    inside = vars(sys.modules.get(owner.__module__, transformers)) if owner is not None else {}
    config = CONFIG_MAPPING[kind]
    if not any(map(get_checkpoint_conversion_mapping, [*inside, kind])) and not getattr(
        config, "sub_configs", None
    ):
        return {}
    return {
        name: config
        for name, value in inside.items()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and getattr(value, "config_class", None) is config
        and getattr(transformers, name, None) is value
    }


def _once(values: dict[str, Any]) -> dict[str, Any]:
    """Every value once: a name of the same value has the first such name."""
    first: dict[str, str] = {}
    return {
        name: value
        if isinstance(value, str)
        else other
        if (other := first.setdefault(json.dumps(value), name)) != name
        else value
        for name, value in sorted(values.items())
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    whole = table()
    lines = [
        f" {json.dumps(key)}: "
        + (
            json.dumps(value)
            if not isinstance(value, dict)
            else "{\n"
            + ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items())
            + "\n }"
        )
        for key, value in whole.items()
    ]
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")
