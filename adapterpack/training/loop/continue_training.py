"""Continues the training of a pack's adapter, and keeps a copy of its starting point where a loss compares
with it.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from ...errors import ConfigError
from ...hub import folder_of
from ...pack import Pack, load
from ...torch_adapters import attach
from ...torch_adapters.layers import wrappers_of
from ...torch_adapters.layers.active import active
from ..config.fields import TrainConfig

log = logging.getLogger(__name__)

_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "alpha"}
"""Settings with per-site values of another setting."""


def load_start(config: TrainConfig) -> Pack:
    """Returns the pack that a training continues from.

    Raises:
        ConfigError: the configuration names another method than the pack's, or other settings of the method.
        StorageError, FormatError: the pack is missing or damaged.
    """
    source = str(config.adapter_name_or_path)
    said = config.method_config
    pack = load(folder_of(source))
    given = config.given
    if given is None:
        usual = dataclasses.asdict(type(said)())
        given = frozenset(
            {"method", *(name for name, value in usual.items() if getattr(said, name) != value)}
        )
    if config.method != pack.manifest.method.type and "method" in given:
        raise ConfigError(
            "the pack that the training continues is of another method",
            where=source,
            expected=config.method,
            found=pack.manifest.method.type,
            remedy="leave the method out",
        )
    alike = type(said) is pack.method.config
    compared = {_PATTERNS.get(name, name) for name in _packed_fields(type(said)) & given} if alike else set()
    for path, own in _configs(pack).items():
        wanted = said.at(path)
        for name in sorted(compared):
            if _hashable(getattr(wanted, name)) != _hashable(getattr(own, name)):
                raise ConfigError(
                    "an adapter keeps the settings of its method when its training continues",
                    where=f"{source}, {name}",
                    expected=getattr(own, name),
                    found=getattr(wanted, name),
                    remedy="leave it out",
                )
    return pack


def with_settings_of_the_pack(config: TrainConfig) -> TrainConfig:
    """Returns the configuration with the method and settings of the pack that it continues from, if any.

    Raises:
        ConfigError, StorageError, FormatError: as for :func:`load_start`.
    """
    if config.adapter_name_or_path is None:
        return config
    pack = load_start(config)
    said = config.method_config
    configs = list(_configs(pack).values())
    if not configs:
        return config
    if unread := sorted({"targets", "modules_to_save"} & (config.given or frozenset())):
        log.warning(
            "%s: the adapter stays at the sites of the pack that is trained on; not read: %s",
            config.pack_name,
            ", ".join(unread),
        )
    # Sites may have different settings; take the most common ones.
    usual = max(configs, key=configs.count)
    cls = type(usual)
    training = {
        field.name: getattr(said, field.name)
        for field in dataclasses.fields(cls)
        if field.name not in _packed_fields(cls) and hasattr(said, field.name)
    }
    leaves = tuple(sorted({path.rpartition(".")[2] for path in _configs(pack)}))
    return dataclasses.replace(
        config,
        method=pack.manifest.method.type,
        origins=None,
        method_config=dataclasses.replace(usual, **{**training, "targets": leaves}),
    )


def _configs(pack: Pack) -> dict[str, Any]:
    """Returns the config of the pack's main method at each of its sites."""
    return {
        group.path: pack.config_at(group)
        for group in pack.groups
        if group.role == "adapter" and group.method is None
    }


def _packed_fields(cls: type[Any]) -> set[str]:
    """Returns the settings that define an adapter, as opposed to how it is trained."""
    return {field.name for field in dataclasses.fields(cls) if field.metadata.get("packed", True)}


def put_back(model: Any, pack: Pack, config: TrainConfig, reference: bool) -> str | None:
    """Attaches the pack to the model for training.

    With ``reference``, attaches a second, frozen copy and returns its name.
    """
    attach(model, pack, config.pack_name)
    if not reference:
        return None
    name = f"{config.pack_name} as it was"
    attach(model, pack, name, check_base=False)
    for wrapper in wrappers_of(model, name):
        wrapper._trainable(name, False)
    active(model, config.pack_name)
    return name


def _hashable(value: Any) -> Any:
    """Returns lists as tuples, so that equal settings compare equal."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
