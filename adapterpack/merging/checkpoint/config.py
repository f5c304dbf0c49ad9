"""Writes the output's ``config.json``: the base's, with what the merge changed about the model."""

from __future__ import annotations

from collections.abc import Sequence

from ...base import TORCH
from ...io import Config, Json
from ...pack import Pack
from ...tasks.data import MARKED, number_labels
from .full_modules import FullModules

_DTYPE_KEYS = ("dtype", "torch_dtype")


def merged_config(
    config: Config,
    packs: Sequence[Pack],
    full_modules: FullModules,
    dtype: str | None,
    untied: bool,
) -> Json:
    """Returns the config of a merge of ``packs`` and their ``full_modules``; ``dtype`` is a safetensors name,
    or None to keep all dtypes.

    Keys keep their order, so that an unchanged config stays equal.
    """
    with_heads = [pack for pack in packs if pack.full()]
    # a diffusers config states its class as _class_name and has no architectures
    config = {**config, **({} if "_class_name" in config else _architecture(with_heads or packs))}
    for pack in with_heads:
        config |= _labels(pack, full_modules)
    if full_modules.vocab_size is not None:
        config["vocab_size"] = full_modules.vocab_size
    if full_modules.untied or untied:
        config["tie_word_embeddings"] = False
    return config if dtype is None else plain_config(config, TORCH[dtype])


def plain_config(config: Config, dtype: str = "float32") -> Json:
    """Returns the config of the same model without its quantization, in a dtype by torch's name.

    Example:
        >>> plain_config({"dtype": "float16", "quantization_config": {"bits": 4}})
        {'dtype': 'float32'}
    """
    return _with_dtype(_plain(config), dtype, top=True)


def _plain(config: Config) -> Json:
    return {
        key: _plain(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }


def _architecture(packs: Sequence[Pack]) -> Json:
    architectures = {pack.manifest.task.architecture for pack in packs} - {None}
    return {"architectures": list(architectures)} if len(architectures) == 1 else {}


def _labels(pack: Pack, full_modules: FullModules) -> Json:
    """Returns the label maps of a head; a pack that names no labels gets numbered labels if the size of its
    head is unambiguous.
    """
    labels = pack.manifest.task.labels
    if labels is None and pack.manifest.task.type.endswith("classification"):
        names = [f"{path}.{param}" for path, params in pack.full().items() for param in params]
        heads = [
            full_modules.added[name]
            for name in names
            if name in full_modules.added and full_modules.added[name].ndim == 2
        ]
        labels = number_labels(len(heads[0])) if len(heads) == 1 else None
    if not labels:
        return {}
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "num_labels": len(labels),
        **({"problem_type": pack.manifest.problem} if pack.manifest.problem in MARKED else {}),
    }


def _with_dtype(config: Config, name: str, top: bool) -> Json:
    """Returns the config with its dtype set, also in those parts (a text or vision model) that state one."""
    parts = {
        key: _with_dtype(value, name, top=False) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    present = [key for key in _DTYPE_KEYS if key in config] or (["dtype"] if top else [])
    return {**parts, **dict.fromkeys(present, name)}
