"""Trains the adapter of a pack further, and keeps a copy of what it was."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...errors import ConfigError
from ...hub.resolve import folder_of
from ...pack.pack import Pack
from ...pack.validate.validation import load
from ..active import active, wrappers_of
from ..config.fields import TrainConfig
from ..inject import attach


def started_from(config: TrainConfig) -> Pack:
    """The pack that a training goes on from.

    Raises:
        ConfigError: the configuration names another method than the pack's, or other settings of it.
        StorageError, FormatError: there is no such pack, or it is damaged.
    """
    source = str(config.adapter_name_or_path)
    pack = load(folder_of(source))
    if config.method not in {pack.manifest.method.type, TrainConfig.method}:
        raise ConfigError("the pack that is trained on is of another method", where=source, expected=config.method,
                          found=pack.manifest.method.type, remedy="leave the method out")
    own, said = pack.manifest.config, config.method_config
    for field in dataclasses.fields(said) if type(said) is pack.method.config else ():
        value, usual = getattr(said, field.name), field.default
        if field.name in own and value not in {usual, _hashable(own[field.name])}:
            raise ConfigError("an adapter keeps the settings of its method when it is trained on", where=f"{source}, {field.name}",
                              expected=own[field.name], found=value, remedy="leave it out")
    return pack


def put_back(model: Any, pack: Pack, config: TrainConfig, reference: bool) -> str | None:
    """Puts the pack into the model, to be trained, and with ``reference`` a second time, not to be; returns the name of that one."""
    attach(model, pack, config.pack_name)
    if not reference:
        return None
    name = f"{config.pack_name} as it was"
    attach(model, pack, name, check_base=False)
    for wrapper in wrappers_of(model):
        if name in wrapper._names:
            wrapper._trainable(name, False)
    active(model, config.pack_name)
    return name


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
