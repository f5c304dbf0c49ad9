"""Limits the time and memory of a validation. A validation that exceeds a limit says so, and never calls the
pack valid.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")


class Spent(Exception):
    """The budget ran out before the check named in the message."""


@dataclass(frozen=True)
class Budget:
    """``seconds`` of wall time from now, and ``memory`` bytes that the files of a pack may take together.

    Example:
        >>> Budget(seconds=0).require_time("the values")
        Traceback (most recent call last):
        ...
        adapterpack.pack.validate.checks.budget.Spent: the values: the time ran out
    """

    seconds: float = 600.0
    memory: int = 8 << 30
    started: float = field(default_factory=time.monotonic)

    def require_time(self, what: str) -> None:
        """Checks that there is time left.

        Raises:
            Spent: the time ran out.
        """
        if time.monotonic() - self.started >= self.seconds:
            raise Spent(f"{what}: the time ran out")

    def over(self, items: Iterable[Item], what: str) -> Iterator[Item]:
        """Yields the items while there is time.

        Raises:
            Spent: the time ran out before the next item.
        """
        for item in items:
            self.require_time(what)
            yield item

    def require_memory(self, size: int, what: str = "the contents of the files") -> None:
        """Checks that ``size`` bytes in total may be held.

        Raises:
            Spent: ``size`` exceeds the limit.
        """
        if size > self.memory:
            raise Spent(f"{what}: {size} bytes are more than the {self.memory} that may be held")
