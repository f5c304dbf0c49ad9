"""Checks the settings in AdapterHub's ``adapter_config.json``: each must have a supported value, or have no
influence on the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import FormatError, Unsupported, excerpt, printable

_REMEDY = "train it without that option, or keep it with the library that made it"


Settings = Mapping[str, Any]
"""The settings of an adapter, as AdapterHub names them."""


def setting(config: Settings, key: str, kind: type, where: str) -> Any:
    """Returns a setting that must exist and have that type.

    Raises:
        FormatError: it is missing or has another type.
    """
    value = config.get(key)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise FormatError(
            "a setting of the adapter is missing, or of another type",
            where=f"{where}#/config/{key}",
            expected=kind.__name__,
            found=excerpt(value),
        )
    return value


def require_settings(
    config: Settings, understood: Mapping[str, tuple[Any, ...]], free: frozenset[str], where: str
) -> None:
    """Checks that every setting is ``free``, or has a value among those ``understood``; a missing setting
    counts as the first of these values.

    Raises:
        Unsupported: a setting would change the outputs.
    """
    for key, value in config.items():
        if key in free:
            continue
        allowed = understood.get(key)
        if allowed is None or not any(value == one and type(value) is type(one) for one in allowed):
            raise Unsupported(
                "a setting of AdapterHub's that is not understood, or that no method here has",
                where=f"{where}#/config/{printable(key[:60])}",
                found=excerpt(value),
                remedy=_REMEDY,
                expected=None if allowed is None else " or ".join(map(repr, allowed)),
            )
