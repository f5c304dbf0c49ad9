"""Reports configuration keys that no part of a training reads, each with the nearest known key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...adapter_methods import Method, SiteConfig, get, methods
from ...errors import ConfigError, closest, excerpt, nearest
from ..trainers.kind import TRAINERS, trainer_of
from .fields import RUN, Settings, field_names
from .tools import ours


def method_of(values: Mapping[Any, Any], where: object) -> Method:
    """Returns the method that settings name, by default LoRA.

    Raises:
        ConfigError: the value is not a name.
        UnknownMethod: there is no such method.
    """
    named = values.get("method", "lora")
    if not isinstance(named, str):
        raise ConfigError(
            "method must be the name of an adapter method",
            where=f"{where}, method",
            expected="a name, such as lora",
            found=excerpt(named),
            remedy="give its settings as keys of their own, such as method: lora and r: 8",
        )
    return get(named.lower())


def require_known(parts: Mapping[Any, Settings]) -> None:
    """Raises if a file's parts (place -> settings) contain unknown keys; a part is the whole file or one
    adapter.

    Raises:
        ConfigError: names all unknown keys in one message.
    """
    unknown: dict[Any, tuple[object, Method]] = {}
    for place, values in parts.items():
        method = method_of(values, place)
        known = {*field_names(method.config), *field_names(trainer_of(values).config), *RUN}
        for key in values:
            if key not in known:
                unknown.setdefault(key, (place, method))
    if len(unknown) == 1:
        ((key, (place, method)),) = unknown.items()
        raise _one(key, method, place)
    if unknown:
        place = next(iter(parts)) if len(parts) == 1 else f"{len(parts)} adapters"
        raise ConfigError(
            f"{len(unknown)} keys are not known",
            where=place,
            found=", ".join(map(repr, unknown)),
            remedy="; ".join(f"{key}: {_advice(key, method)}" for key, (_, method) in unknown.items()),
        )


def _one(key: Any, method: Method, where: object) -> ConfigError:
    """Returns the error for a single unknown key, with the other methods or trainers that have it."""
    having = _having(key)
    if trainers := _trainers(key):
        return ConfigError(
            f"this is a setting of the trainers {', '.join(trainers)}",
            where=where,
            found=repr(key),
            remedy=f"leave it out, or choose one of them: trainer: {trainers[0]}",
        )
    if not having:
        return ConfigError(
            "unknown key",
            where=where,
            found=repr(key),
            remedy=ours().instead.get(key) or nearest(str(key), _keys(method)),
        )
    hyperparameters = [name for name in field_names(method.config) if name not in field_names(SiteConfig)]
    return ConfigError(
        f"the method {method.name} has no {key}",
        where=where,
        found=repr(key),
        expected=f"one of its own: {', '.join(hyperparameters) or 'none'}",
        remedy=f"leave it out, or choose a method that has it: {', '.join(having)}",
    )


def _advice(key: Any, method: Method) -> str:
    """Returns what to do about an unknown key, in a few words."""
    if trainers := _trainers(key):
        return f"a setting of the trainers {', '.join(trainers)}"
    if having := _having(key):
        return f"a setting of {', '.join(having[:3])}, not of {method.name}"
    close = closest(str(key), sorted(_keys(method)))
    return ours().instead.get(key) or ("leave it out" if close is None else f"did you mean '{close}'?")


def own_settings() -> frozenset[str]:
    """Returns all settings of this package: of a run, of every method, and of every trainer."""
    ours = [method.config for method in methods().values()] + [kind.config for kind in TRAINERS.values()]
    return RUN | {name for config in ours for name in field_names(config)}


def _having(key: Any) -> list[str]:
    """Returns the methods that have the setting."""
    return sorted(method.name for method in methods().values() if key in field_names(method.config))


def _trainers(key: Any) -> list[str]:
    """Returns the trainers that have the setting."""
    return sorted(kind.name for kind in TRAINERS.values() if key in field_names(kind.config))


def _keys(method: Method) -> set[str]:
    """Returns all keys that a configuration with this method may have."""
    return {*field_names(method.config), *RUN, *ours().keys, "adapters"}
