"""What the configs of all methods have in common, and the checks that they share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """Where an adapter goes. A method's config is a frozen dataclass on top of this; its fields are the method's only schema.

    Example:
        >>> SiteConfig(targets=("q_proj", "v_proj")).at("layers.0.q_proj").scale
        1.0
    """

    targets: str | tuple[str, ...] = "all-linear"
    modules_to_save: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout!r}")

    def at(self, path: str) -> Self:
        """The config as it holds for one site, patterns resolved."""
        return self

    @property
    def scale(self) -> float:
        """The number that multiplies the branch; written to the manifest for every site."""
        return 1.0

    @property
    def rank(self) -> int | None:
        """The rank of the branch, or None for a method without one."""
        return None


@dataclass(frozen=True, kw_only=True)
class NoBranch(SiteConfig):
    """The config of a method that puts no branch beside the layer: there is nothing that dropout could act on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError(f"dropout acts on a branch beside the layer, and this method has none: not {self.dropout!r}")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def require_whole(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless ``value`` is a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def require_flag(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is true or false."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, not {value!r}")


def require_number(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is a finite number."""
    if not is_number(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")


def by_suffix(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """What a pattern says of a site: by the literal path or its last components; the longest name that fits counts.

    A name that begins with ``^`` fits that path alone.

    Example:
        >>> by_suffix({"v_proj": 2, "1.v_proj": 4}, "layers.1.v_proj", 8)
        4
    """
    matches = [key for key in pattern if f"^{path}" == key or f".{path}".endswith(f".{key}")]
    return pattern[max(matches, key=len)] if matches else default
