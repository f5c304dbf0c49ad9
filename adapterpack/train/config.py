"""The training configuration: one flat dataclass, its YAML form, aliases of other tools, and overrides."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, nearest, storage_errors
from ..methods import get

ALIASES: dict[str, str] = {
    # PEFT and TRL names for the hyper-parameters of a method
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "lora_target_modules": "targets",
    "peft_type": "method",
    # axolotl
    "base_model": "model_name_or_path",
    "adapter": "method",
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "lr_scheduler": "lr_scheduler_type",
    "num_epochs": "num_train_epochs",
    "lora_modules_to_save": "modules_to_save",
    # LLaMA-Factory
    "lora_rank": "r",
    "lora_target": "targets",
    "cutoff_len": "max_length",
    "finetuning_type": "method",
    "additional_target": "modules_to_save",
    # earlier and other names
    "max_seq_length": "max_length",
    "model_name": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "dataset": "train_file",
    "output": "output_dir",
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that one adapter's training is told; the hyper-parameters of its method are in ``method_config``.

    ``train_file`` and ``eval_file`` are json, jsonl, csv or parquet files, or a hub data set's name.
    """

    model_name_or_path: str
    train_file: str
    output_dir: str
    task: str = "text-generation"
    name: str | None = None
    method: str = "lora"
    eval_file: str | None = None
    max_length: int = 512
    learning_rate: float = 2e-4
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    logging_steps: int = 10
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    max_train_samples: int | None = None
    skip_train_samples: int = 0
    method_config: Any = None

    @property
    def pack_name(self) -> str:
        """The pack's name: ``name``, or the output folder's."""
        return self.name or Path(self.output_dir).name


def read_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | TrainConfig, overrides: Iterable[str] = ()
) -> tuple[list[TrainConfig], list[str]]:
    """The configs of a YAML file (or mapping), one for each entry of ``adapters:``, and the translations that were made.

    ``overrides`` are ``key=value`` texts; they win over the file. With ``adapters:``, every entry takes the common keys and its own, and
    writes to ``output_dir/name``.

    Raises:
        ConfigError: an unknown key, a missing key, or a value of the wrong type; the nearest key is named.
    """
    if isinstance(source, TrainConfig):
        return [source], []
    where = "the configuration" if isinstance(source, Mapping) else source
    common = dict(source) if isinstance(source, Mapping) else _load_yaml(Path(source))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError("an override must be key=value", found=repr(text))
        common[key] = yaml.safe_load(value)
    entries = common.pop("adapters", None)
    notes: list[str] = []
    if entries is None:
        return [_config(common, notes, where)], notes
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) and "name" in entry for entry in entries):
        raise ConfigError("adapters must be a list of entries, each with a name", where=where)
    configs = []
    for entry in entries:
        merged = {**common, **entry}
        if "output_dir" in common and "output_dir" not in entry:
            merged["output_dir"] = str(Path(str(common["output_dir"])) / str(entry["name"]))
        configs.append(_config(merged, notes, where))
    return configs, notes


def _load_yaml(path: Path) -> dict[str, Any]:
    with storage_errors(path):
        text = path.read_text("utf-8")
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"this is not valid YAML: {' '.join(str(error).split())}", where=path) from error
    if not isinstance(loaded, dict):
        raise ConfigError("the configuration must be a mapping of keys to values", where=path, found=type(loaded).__name__)
    return loaded


def _config(values: Mapping[str, Any], notes: list[str], where: object) -> TrainConfig:
    translated: dict[str, Any] = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name != key:
            notes.append(f"{key} is read as {name}")
        if name in translated:
            raise ConfigError("a setting is given twice", where=where, found=f"{name} and its alias {key}")
        translated[name] = value
    method = get(str(translated.get("method", "lora")).lower())
    own = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "method_config"}
    theirs = {f.name for f in dataclasses.fields(method.config)}
    for key in translated:
        if key not in own and key not in theirs:
            raise ConfigError("unknown key", where=where, found=repr(key), remedy=nearest(key, {*own, *theirs, *ALIASES, "adapters"}))
    for name, field in own.items():
        if field.default is dataclasses.MISSING and name not in translated:
            raise ConfigError("a key is missing", where=where, expected=name, remedy=f"add '{name}: ...'")
    hints = typing.get_type_hints(TrainConfig)
    settings = {key: _typed(key, value, hints[key], where) for key, value in translated.items() if key in own}
    hyper = {key: tuple(value) if isinstance(value, list) else value for key, value in translated.items() if key in theirs}
    try:
        method_config = method.config(**hyper)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the method's configuration is not usable: {error}", where=where) from error
    return TrainConfig(**{**settings, "method": method.name}, method_config=method_config)


def _typed(key: str, value: Any, hint: Any, where: object) -> Any:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in allowed:
        return None
    if float in allowed and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed if kind is not types.NoneType)
        raise ConfigError("a value of the wrong type", where=f"{where}, {key}", expected=names, found=f"{value!r} ({type(value).__name__})")
    return value
