"""Limits the time and memory of a validation; one that runs out of either says so, and nothing is called
valid.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


class Spent(Exception):
    """The budget ran out before the check that is named was made."""


@dataclass(frozen=True)
class Budget:
    """``seconds`` of wall time from now, and ``memory`` bytes that the files of a pack may take together.

    Example:
        >>> Budget(seconds=0).require_time("the values")
        Traceback (most recent call last):
        ...
        adapterpack.pack.validate.budget.Spent: the values: the time ran out
    """

    seconds: float = 600.0
    memory: int = 8 << 30
    started: float = field(default_factory=time.monotonic)

    def require_time(self, what: str) -> None:
        """Goes on only while there is time.

        Raises:
            Spent: there is none left.
        """
        if time.monotonic() - self.started >= self.seconds:
            raise Spent(f"{what}: the time ran out")

    def over(self, items: Iterable[Item], what: str) -> Iterator[Item]:
        """The items, one after the other, as long as there is time.

        Raises:
            Spent: there is none left before the next one.
        """
        for item in items:
            self.require_time(what)
            yield item

    def require_memory(self, size: int, what: str = "the contents of the files") -> None:
        """Goes on only if ``size`` bytes may be held, all together.

        Raises:
            Spent: that is more than allowed.
        """
        if size > self.memory:
            raise Spent(f"{what}: {size} bytes are more than the {self.memory} that may be held")
