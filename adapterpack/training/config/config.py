"""The training configuration: one flat dataclass, its YAML form, and overrides."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapter_methods import Method, SiteConfig, get, methods
from ...errors import ConfigError, nearest
from ...io import plain_yaml
from .aliases import ALIASES, translate
from .coerce import typed_value

LEAST: dict[str, float] = {
    "max_length": 1,
    "learning_rate": 0,
    "num_train_epochs": 0,
    "max_steps": -1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "logging_steps": 1,
    "seed": 0,
    "max_train_samples": 1,
    "skip_train_samples": 0,
}
"""The least value of each number; the schema says the same."""

POSITIVE = frozenset({"learning_rate", "num_train_epochs"})
"""Of these, zero would train nothing."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""What a pack may be called, as the manifest has it; checked before training, not after."""


@dataclass(frozen=True)
class TrainConfig:
    """All settings of one adapter's training; the hyper-parameters of its method are in ``method_config``.

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
    group_by_length: bool = False
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
        ConfigError: an unknown key, a missing key, or a value of the wrong type or out of range; the nearest key is named.
    """
    notes: list[str] = []
    where = "the configuration" if isinstance(source, Mapping | TrainConfig) else source
    if isinstance(source, TrainConfig):
        settings = _as_mapping(source)
    else:
        settings = dict(source) if isinstance(source, Mapping) else _load_yaml(Path(source))
    entries = settings.pop("adapters", None)
    wins = translate(dict(map(_override, overrides)), notes, "an override")
    common = {**translate(settings, notes, where), **wins}
    if entries is None:
        return [_config(common, where)], notes
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) and "name" in entry for entry in entries):
        raise ConfigError("adapters must be a list of entries, each with a name", where=where)
    if "name" in wins:
        raise ConfigError("one name for several adapters", where="an override", found="name", remedy="rename them in the file")
    configs = []
    for entry in entries:
        overridden = {key: value for key, value in translate(entry, notes, f"{where}, adapter {entry['name']}").items() if key not in wins}
        if "output_dir" in common and "output_dir" not in overridden:
            overridden["output_dir"] = str(Path(str(common["output_dir"])) / str(entry["name"]))
        configs.append(_config({**common, **overridden}, f"{where}, adapter {entry['name']}"))
    for key in ("name", "output_dir"):
        values = [getattr(config, key) for config in configs]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ConfigError(f"two adapters have the same {key}", where=where, found=", ".join(twice))
    return configs, notes


def _as_mapping(config: TrainConfig) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "method_config"}
    fields = () if config.method_config is None else dataclasses.fields(config.method_config)
    return {**values, **{f.name: getattr(config.method_config, f.name) for f in fields}}


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError("an override must be key=value", found=repr(text))
    if key == "adapters":
        raise ConfigError("adapters can only be listed in the file", where="an override", found=repr(text))
    return key, plain_yaml.loads(value, key, what="the value of an override is not valid YAML")


def _load_yaml(path: Path) -> dict[str, Any]:
    loaded = plain_yaml.read(path)
    if not isinstance(loaded, dict):
        raise ConfigError("the configuration must be a mapping of keys to values", where=path, found=type(loaded).__name__)
    return loaded


def _hints(cls: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields; those that another package cannot say at run time are left open."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {f.name: Any for f in dataclasses.fields(cls)}


def _unknown(key: Any, method: Method, keys: set[str], where: object) -> ConfigError:
    """The error for a key that neither a training nor its method has; it names the other methods that have it."""
    having = sorted(other.name for other in methods().values() if key in {f.name for f in dataclasses.fields(other.config)})
    if not having:
        return ConfigError("unknown key", where=where, found=repr(key), remedy=nearest(str(key), keys))
    common = {f.name for f in dataclasses.fields(SiteConfig)}
    hyperparameters = [f.name for f in dataclasses.fields(method.config) if f.name not in common]
    return ConfigError(f"the method {method.name} has no {key}", where=where, found=repr(key),
                       expected=f"one of its own: {', '.join(hyperparameters) or 'none'}",
                       remedy=f"leave it out, or choose a method that has it: {', '.join(having)}")


def _config(values: Mapping[str, Any], where: object) -> TrainConfig:
    method = get(str(values.get("method", "lora")).lower())
    run_fields = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "method_config"}
    method_fields = {f.name for f in dataclasses.fields(method.config)}
    for key in values:
        if key not in run_fields and key not in method_fields:
            raise _unknown(key, method, {*run_fields, *method_fields, *ALIASES, "adapters"}, where)
    for name, field in run_fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ConfigError("a key is missing", where=where, expected=name, remedy=f"add '{name}: ...'")
    hints = {**_hints(method.config), **_hints(TrainConfig)}
    typed = {key: typed_value(key, value, hints[key], where) for key, value in values.items()}
    for key, least in LEAST.items():
        value, above = typed.get(key), key in POSITIVE
        if value is not None and not (least <= value < math.inf and (value > 0 or not above)):
            expected = f"{'more than' if above else 'at least'} {least}, and finite"
            raise ConfigError("a number out of range", where=f"{where}, {key}", expected=expected, found=value)
    try:
        method_config = method.config(**{key: value for key, value in typed.items() if key in method_fields})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the method's configuration is not usable: {error}", where=where) from error
    settings = {key: value for key, value in typed.items() if key in run_fields}
    config = TrainConfig(**{**settings, "method": method.name}, method_config=method_config)
    if not re.fullmatch(NAME, config.pack_name):
        raise ConfigError("a pack cannot have this name", where=f"{where}, name", found=repr(config.pack_name),
                          expected="up to 128 letters, digits, dots, underscores and hyphens, the first a letter or digit")
    return config
