"""Several adapters as one: a row has the sum of their changes, each times a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ...adapter_methods.core.token_positions import Acts
from ...errors import ConfigError
from ...pack.pack import Pack
from ...slots.sums import NotASum

MOST = 8
"""Adapters of one mix."""
LARGEST = 10.0
"""The largest weight, in either direction."""


class Weighted(NamedTuple):
    """One adapter of a mix."""

    pack: Pack
    weight: float


@dataclass(frozen=True)
class Mix:
    """Adapters with their weights, in the order of their names. It has a name and a digest, as a pack does,
    which say all of it.

    Raises:
        ConfigError: there are none or too many, one is there twice, or a weight is out of range.
        NotASum: one has a prompt, or they act at different positions of a row.
    """

    parts: tuple[Weighted, ...]

    def __post_init__(self) -> None:
        names = [part.pack.name for part in self.parts]
        if not 1 <= len(names) <= MOST or len(set(names)) < len(names):
            raise ConfigError(
                "a mix has some adapters, each once",
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
                    "a prompt is no change that could be added to others",
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
        """The names and weights."""
        return "+".join(f"{pack.name}*{weight!r}" for pack, weight in self.parts)

    @cached_property
    def id(self) -> str:
        """The digests and weights."""
        return "+".join(f"{pack.id}*{weight!r}" for pack, weight in self.parts)

    @property
    def acts(self) -> Acts | None:
        """At which positions of a row all of them act."""
        return self.parts[0].pack.acts


def combine(parts: Iterable[tuple[Pack, float]]) -> Pack | Mix:
    """What these adapters with these weights are together: one alone with the weight 1 is itself.

    Raises:
        ConfigError, NotASum: see :class:`Mix`.
    """
    weighted = tuple(
        sorted((Weighted(pack, float(weight)) for pack, weight in parts), key=lambda part: part.pack.name)
    )
    if len(weighted) == 1 and weighted[0].weight == 1.0:
        return weighted[0].pack
    return Mix(weighted)


Names = Sequence[str | None] | str | None
"""The adapter of each row: a name, or None for the base; or one for all rows."""
Mixes = Names | Mapping[str, float] | Sequence[str | Mapping[str, float] | None]
"""The adapter of each row as :data:`.Names`, or names with weights; or one of them for all rows."""


def parts_of(adapter: Pack | Mix) -> tuple[Weighted, ...]:
    """The packs of a row's adapter with their weights."""
    return adapter.parts if isinstance(adapter, Mix) else (Weighted(adapter, 1.0),)
