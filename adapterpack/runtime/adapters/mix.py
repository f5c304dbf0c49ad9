"""Mixes of adapters: a row runs with the weighted sum of the changes of several adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ...adapter_methods import Acts
from ...errors import ConfigError
from ...pack import Pack
from ...slots import NotASum

MOST = 8
"""The most adapters in one mix."""
LARGEST = 10.0
"""The largest absolute value of a weight."""


class Weighted(NamedTuple):
    """One adapter of a mix and its weight."""

    pack: Pack
    weight: float


@dataclass(frozen=True)
class Mix:
    """Adapters with their weights, sorted by name.

    Like a pack, a mix has a ``name`` and a digest, ``id``; both are made of those of its parts and their
    weights, so equal mixes have equal digests.

    Raises:
        ConfigError: there are none or too many, one is there twice, or a weight is out of range.
        NotASum: an adapter has a prompt, or the adapters act at different positions of a row.
    """

    parts: tuple[Weighted, ...]

    def __post_init__(self) -> None:
        names = [part.pack.name for part in self.parts]
        if not 1 <= len(names) <= MOST or len(set(names)) < len(names):
            raise ConfigError(
                "a mix must name one adapter or more, each once",
                where="adapters",
                expected=f"1 to {MOST}",
                found=", ".join(names),
            )
        for pack, weight in self.parts:
            if not (math.isfinite(weight) and abs(weight) <= LARGEST):
                raise ConfigError(
                    "the weight of an adapter is out of range",
                    where="adapters",
                    found=f"{weight} of {pack.name}",
                    expected=f"-{LARGEST:g} to {LARGEST:g}",
                )
            if pack.method.kind == "prompt":
                raise NotASum(
                    "a prompt cannot be added to other adapters",
                    where="adapters",
                    found=pack.name,
                    remedy="name it alone",
                )
        if len({part.pack.acts for part in self.parts}) > 1:
            raise NotASum(
                "these adapters act at different positions of a row",
                where="adapters",
                found=", ".join(names),
                remedy="name adapters that act at the same ones",
            )

    @cached_property
    def name(self) -> str:
        """The names and weights of the parts, joined by ``+``."""
        return "+".join(f"{pack.name}*{weight!r}" for pack, weight in self.parts)

    @cached_property
    def id(self) -> str:
        """The digests and weights of the parts, joined by ``+``."""
        return "+".join(f"{pack.id}*{weight!r}" for pack, weight in self.parts)

    @property
    def acts(self) -> Acts | None:
        """The rule for the positions at which the adapters act; all parts have the same."""
        return self.parts[0].pack.acts


def combine(parts: Iterable[tuple[Pack, float]]) -> Pack | Mix:
    """Combines adapters and their weights into a mix; a single adapter with the weight 1 stays a plain pack.

    Raises:
        ConfigError, NotASum: the adapters do not form a mix; see :class:`Mix`.
    """
    weighted = tuple(
        sorted((Weighted(pack, float(weight)) for pack, weight in parts), key=lambda part: part.pack.name)
    )
    if len(weighted) == 1 and weighted[0].weight == 1.0:
        return weighted[0].pack
    return Mix(weighted)


Names = Sequence[str | None] | str | None
"""The adapter of each row, as a name or None for the base; or a single value for all rows."""
Mixes = Names | Mapping[str, float] | Sequence[str | Mapping[str, float] | None]
"""The adapter of each row as in :data:`.Names`, or as names with weights; or a single value for all rows."""


def parts_of(adapter: Pack | Mix) -> tuple[Weighted, ...]:
    """Returns the packs of a row's adapter with their weights; a plain pack has the weight 1."""
    return adapter.parts if isinstance(adapter, Mix) else (Weighted(adapter, 1.0),)
