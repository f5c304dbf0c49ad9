"""Reads training configurations: YAML files or mappings, overrides, and lists of adapters."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...adapter_methods import Method
from ...adapter_methods.core.config import types_of_fields
from ...errors import ConfigError
from ...io import plain_yaml, strict_json
from ...paths import StrPath
from ...tasks import TASKS
from ..trainers.kind import TrainerKind, trainer_of
from .coerce import typed_value
from .fields import LEAST, NAME, PARTS, POSITIVE, RUN, Settings, TrainConfig, field_names
from .sources import sources_of
from .tools import OtherTool, Translation, is_set, ours, tool_of, translate
from .unknown_keys import method_of, own_settings, require_known


def read_config(
    source: StrPath | Settings | TrainConfig, overrides: Iterable[str] = (), tool: str | None = None
) -> tuple[list[TrainConfig], list[str]]:
    """Returns the configs of a YAML file or mapping, one for each entry of ``adapters:``, and notes on the
    translations that it made.

    A file of another tool (``tool``, or what its keys show) has that tool's names, defaults and meanings.
    ``overrides`` are ``key=value`` strings, which take precedence over the file. With ``adapters:``, each
    entry combines the common keys with its own, and writes to ``output_dir/name``. Settings that list values
    where one is meant, ``learning_rate: [1e-4, 1e-3]``, give such an entry for each combination.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type or is out of range; the error
            suggests the nearest key.
    """
    notes: list[str] = []
    where = "the configuration" if isinstance(source, Mapping | TrainConfig) else source
    given = as_mapping(source) if isinstance(source, TrainConfig) else source
    settings = dict(given if isinstance(given, Mapping) else _load_yaml(Path(given)))
    entries = settings.pop("adapters", None)
    # Later sources take precedence: another tool's defaults, the file's common keys, an adapter's own keys,
    # overrides.
    wins, won = _under_our_names(dict(map(_override, overrides)), ours(), notes, "an override")
    common, origins = _read_file(settings, tool_of(settings, tool), notes, where)
    common = {**common, **wins}
    origins = {**origins, **dict.fromkeys(won, "an override")}
    if entries is None and (entries := _sweep(common, where)):
        wins = {key: value for key, value in wins.items() if key not in entries[0]}
    if entries is None:
        require_known({where: common})
        one = _config(common, where, origins)
        if isinstance(source, TrainConfig) and not wins:
            one = dataclasses.replace(one, origins=source.origins)
        return [one], notes
    if (
        not isinstance(entries, list)
        or not entries
        or not all(isinstance(entry, Mapping) and "name" in entry for entry in entries)
    ):
        raise ConfigError("adapters must be a list of entries, each with a name", where=where)
    if "name" in wins:
        raise ConfigError(
            "several adapters cannot have one name",
            where="an override",
            found="name",
            remedy="rename them in the file",
        )
    whole = {}
    for entry in entries:
        place = f"{where}, adapter {entry['name']}"
        if place in whole:
            raise ConfigError("two adapters have the same name", where=where, found=entry["name"])
        own, _ = _under_our_names(entry, ours(), notes, place)
        whole[place] = {**common, **own, **wins}
        if "output_dir" in wins or ("output_dir" in common and "output_dir" not in own):
            whole[place]["output_dir"] = str(Path(str(common["output_dir"])) / str(entry["name"]))
    require_known(whole)
    configs = [
        _config(values, place, {**dict.fromkeys(values, "the file"), **origins})
        for place, values in whole.items()
    ]
    folders = [config.output_dir for config in configs]
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        raise ConfigError("two adapters have the same output_dir", where=where, found=", ".join(twice))
    return configs, notes


_MOST_VARIANTS = 64


def _sweep(values: Settings, where: object) -> list[dict[str, Any]] | None:
    """Returns an entry for each combination of settings that list several values where one is meant; None if
    none does.

    Raises:
        ConfigError: there are too many combinations.
    """
    first = {
        key: value[0] if isinstance(value, list) and len(value) > 1 else value
        for key, value in values.items()
    }
    if first == values or not isinstance(first.get("method", "lora"), str):
        return None
    hints = _hints(method_of(first, where), trainer_of(first))
    swept = {key: values[key] for key in values if first[key] != values[key] and _takes_one(key, hints)}
    variants = [dict(zip(swept, chosen, strict=True)) for chosen in itertools.product(*swept.values())]
    if len(variants) > _MOST_VARIANTS:
        raise ConfigError(
            "the settings that list values have too many combinations",
            where=f"{where}, {', '.join(swept)}",
            expected=f"at most {_MOST_VARIANTS}",
            found=len(variants),
        )
    name = str(values.get("name") or Path(str(values.get("output_dir", "adapter"))).name)
    named = {"-".join([name, *(f"{key}-{value}" for key, value in one.items())]): one for one in variants}
    return [{"name": name, **one} for name, one in named.items()] if swept else None


def _takes_one(key: str, hints: Settings) -> bool:
    """Whether a setting takes one value and no list."""
    if key not in hints:
        return False
    try:
        typed_value(key, [], hints[key], "")
    except ConfigError:
        return True
    return False


def _hints(method: Method, kind: TrainerKind) -> Settings:
    """Returns the types of all settings of a training with this method and trainer."""
    return {**types_of_fields(method.config), **types_of_fields(kind.config), **types_of_fields(TrainConfig)}


def _under_our_names(
    values: Settings, tool: OtherTool, notes: list[str], where: object
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns values that are no file of another tool under our names, and where each came from; notes each
    name that is another's.
    """
    done = translate(values, tool, notes, where)
    for name, key in done.origins.items():
        if key != name and (note := f"{key} is read as {name}") not in notes:
            notes.append(note)
    return done.settings, _origins(done)


def _read_file(
    settings: Settings, tool: OtherTool, notes: list[str], where: object
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a file's settings under our names, with the defaults of the tool that it was written for, and
    where each came from; what is not set in it is left out.

    Raises:
        ConfigError: the file trains the whole model, or has settings that are not supported.
    """
    given = {key: value for key, value in settings.items() if is_set(value)}
    if not tool.key:
        return _under_our_names(given, tool, notes, where)
    if str(given.get(tool.trains_an_adapter, "")).lower() in tool.whole_model:
        raise ConfigError(
            f"this {tool.name} file trains the whole model",
            where=where,
            remedy=f"to train an adapter instead, set {tool.instead}",
        )
    done = translate(given, tool, notes, where, own_settings() if tool.ignores_unknown_keys else ())
    usual = {name: value for name, value in tool.defaults.items() if name not in done.settings}
    notes.insert(0, f"read as a file of {tool.name}, with its names, defaults and meanings")
    notes += [f"left out {', '.join(keys)}: {reason}" for reason, keys in done.left_out.items()]
    return {**usual, **done.settings}, {**dict.fromkeys(usual, f"{tool.name}'s default"), **_origins(done)}


def _origins(done: Translation) -> dict[str, str]:
    """Returns where settings of a file came from, in words."""
    return {name: "the file" if key == name else _OTHER + key for name, key in done.origins.items()}


_OTHER = "the file's "
"""What precedes the name that a file has for a setting of ours."""


def as_mapping(config: TrainConfig) -> Settings:
    """Returns all settings of a run and of its method as a mapping that reads back as this configuration.

    For a pack that is trained further, it contains only those of the method's settings that were given.
    """
    values = {name: getattr(config, name) for name in field_names(type(config)) if name in RUN}
    own = {name: getattr(part, name) for part in config.own for name in field_names(type(part))}
    if config.adapter_name_or_path is None or config.given is None:
        return {**values, **own}
    of_pack = {"method", *field_names(type(config.method_config))} - config.given
    return {key: value for key, value in {**values, **own}.items() if key not in of_pack}


_PLACES = frozenset(
    {
        "model_name_or_path",
        "tokenizer",
        "train_file",
        "eval_file",
        "output_dir",
        "overwrite_output_dir",
        "name",
        "report_to",
        "adapter_name_or_path",
    }
)
"""Settings that name a place on this machine; the pack describes what is there instead."""


def claim(config: TrainConfig) -> Settings:
    """Returns the settings that a pack claims about its training, without those specific to a machine."""
    plain: dict[str, Any] = strict_json.plain(
        {key: value for key, value in as_mapping(config).items() if key not in _PLACES}
    )
    return plain


def _override(text: str) -> tuple[str, Any]:
    """Parses a ``key=value`` override; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError("an override must be key=value", found=repr(text))
    if key == "adapters":
        raise ConfigError("adapters can only be listed in the file", where="an override", found=repr(text))
    return key, plain_yaml.loads(value, key, what="the value of an override is not valid YAML")


def _load_yaml(path: Path) -> Settings:
    """Reads a YAML file whose top level is a mapping."""
    loaded = plain_yaml.read(path)
    if not isinstance(loaded, dict):
        raise ConfigError(
            "the configuration must be a mapping of keys to values", where=path, found=type(loaded).__name__
        )
    return loaded


def _require_bounds(typed: Settings, where: object, written: Mapping[str, str]) -> None:
    """Raises if a number of a run is out of range; names a key as the file has ``written`` it."""
    for key, least in LEAST.items():
        value = typed.get(key)
        above = key in POSITIVE
        if value is not None and not (least <= value < math.inf and (value > 0 or not above)):
            expected = f"{'more than' if above else 'at least'} {least}, and finite"
            raise ConfigError(
                "a number out of range",
                where=f"{where}, {written.get(key, key)}",
                expected=expected,
                found=value,
            )
    if typed.get("label_smoothing_factor", 0) >= 1:
        raise ConfigError(
            "a number out of range",
            where=f"{where}, label_smoothing_factor",
            expected="at least 0, and less than 1",
            found=typed["label_smoothing_factor"],
        )


def _targets(values: Settings, method: Method) -> dict[str, str]:
    """Returns the task's default targets, where they replace the method's usual ``all-linear``."""
    task = TASKS.find(str(values["task"]))
    adapted = None if task is None or task.training is None else task.training.adapted
    usual = {field.name: field.default for field in dataclasses.fields(method.config)}.get("targets")
    new = values.get("adapter_name_or_path") is None
    return {"targets": adapted} if adapted is not None and usual == "all-linear" and new else {}


def _config(values: Settings, where: object, origins: Mapping[str, str]) -> TrainConfig:
    """Checks the values of one adapter and returns its config."""
    method = method_of(values, where)
    kind = trainer_of(values)
    values = {
        **kind.defaults,
        "task": kind.tasks[0] if kind.tasks else TrainConfig.task,
        **values,
        "trainer": kind.name,
    }
    values = {**_targets(values, method), **values}
    run_fields = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name not in PARTS}
    method_fields, kind_fields = (set(field_names(part.config)) for part in (method, kind))
    if both := sorted(method_fields & kind_fields):
        raise ConfigError(
            f"the method {method.name} and the trainer {kind.name} both have a setting of this name",
            where=where,
            found=", ".join(both),
            remedy="choose another method",
        )
    for name, field in run_fields.items():
        if field.default is field.default_factory is dataclasses.MISSING and name not in values:
            raise ConfigError("a key is missing", where=where, expected=name, remedy=f"add '{name}: ...'")
    # Keys are known and complete by now; what remains are their types and ranges.
    hints = _hints(method, kind)
    written = {
        name: key for name, origin in origins.items() if (key := origin.removeprefix(_OTHER)) != origin
    }
    typed = {
        key: typed_value(written.get(key, key), value, hints[key], where) for key, value in values.items()
    }
    _require_bounds(typed, where, written)
    if typed.get("load_in_4bit") and typed.get("load_in_8bit"):
        raise ConfigError(
            "a base is quantized to 4 bits or to 8, not to both",
            where=where,
            found="load_in_4bit and load_in_8bit",
        )
    for key in ("train_file", "eval_file"):
        if typed.get(key) is not None:
            sources_of(typed[key], f"{where}, {key}")
    if typed.get("val_set_size") and typed.get("eval_file") is not None:
        raise ConfigError(
            "rows to evaluate are a part of the training data or have data of their own",
            where=where,
            found="val_set_size and eval_file",
        )
    if typed.get("max_steps") == 0:
        raise ConfigError(
            "a number out of range",
            where=f"{where}, max_steps",
            expected="at least 1, or -1 for epochs",
            found=0,
        )
    try:
        method_config = method.config(**{key: value for key, value in typed.items() if key in method_fields})
        trainer_config = kind.config(**{key: value for key, value in typed.items() if key in kind_fields})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a setting cannot be used: {error}", where=where) from error
    settings = {key: value for key, value in typed.items() if key in run_fields}
    config = TrainConfig(
        **{**settings, "method": method.name},
        method_config=method_config,
        trainer_config=trainer_config,
        origins=origins,
    )
    if not re.fullmatch(NAME, config.pack_name):
        raise ConfigError(
            "a pack cannot have this name",
            where=f"{where}, name",
            found=repr(config.pack_name),
            expected="up to 128 letters, digits, dots, underscores and hyphens, the first a letter or digit",
        )
    return config
