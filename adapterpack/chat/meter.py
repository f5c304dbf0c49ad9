"""Meters one rendering of a template: time and characters, paid for before they are made."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

from jinja2.exceptions import TemplateRuntimeError

SECONDS = 5.0
"""Processor time of one rendering."""
ROOM = 8 << 20
"""How much one rendering may do, in characters that it makes; a step costs as much as :data:`STEP` of them, a value :data:`COST`."""
FOR_EACH = 64
"""How much more it may do for each character of its values."""
STEP, COST = 64, 16
_BITS = 1 << 14


class Meter:
    """What one rendering may still do. ``values`` are those that it is given, and does not make."""

    def __init__(self, values: Any, seconds: float = SECONDS, room: int = ROOM) -> None:
        self._until = time.thread_time() + seconds
        self._sizes: dict[int, tuple[Any, int]] = {}
        self._seconds, self._most = seconds, 1 << 62
        self._most = self._left = room + FOR_EACH * self.size(values)

    def step(self) -> None:
        """Pays for one step.

        Raises:
            TemplateRuntimeError: the time is over, or there were too many.
        """
        if time.thread_time() > self._until:
            raise TemplateRuntimeError(f"it takes more than {self._seconds:g} s")
        self.spend(STEP)

    def spend(self, characters: int) -> None:
        """Pays for something that is going to be made.

        Raises:
            TemplateRuntimeError: there is not so much left.
        """
        self._left -= max(characters, 0)
        if self._left < 0:
            raise TemplateRuntimeError(f"it takes more than {self._most} steps and characters")

    def size(self, value: Any) -> int:
        """The characters of a value when it is written out: a text that is in a list twice counts twice.

        Raises:
            TemplateRuntimeError: it is too large.
        """
        if isinstance(value, str | bytes):
            return COST + len(value)
        if isinstance(value, int) and value.bit_length() > _BITS:
            raise TemplateRuntimeError("it makes a number of too many digits")
        if not isinstance(value, Collection) or isinstance(value, range):
            return COST
        if id(value) not in self._sizes:
            items: Iterable[Any] = chain(value.keys(), value.values()) if isinstance(value, Mapping) else value
            total = COST + sum(map(self.size, items))
            if total > self._most:
                raise TemplateRuntimeError(f"it makes a list that is longer than {self._most} characters when it is written out")
            self._sizes[id(value)] = value, total  # the value is kept, so that no other one takes its identity
        return self._sizes[id(value)][1]

    def made(self, value: Any) -> Any:
        """The value, paid for; what is in a list was paid for when it was made."""
        self.size(value)
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, Collection) and not isinstance(value, range):
            self.spend(COST * len(value))
        return value

    def require_product(self, left: Any, right: Any) -> None:
        """Pays for what a multiplication makes of a text or a list."""
        for one, times in ((left, right), (right, left)):
            if isinstance(one, str | bytes | list | tuple) and isinstance(times, int):
                self.spend(times * len(one) * (1 if isinstance(one, str | bytes) else COST))

    def require_power(self, base: Any, exponent: Any) -> None:
        """Checks that a power has not too many digits."""
        if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > _BITS:
            raise TemplateRuntimeError("it makes a number of too many digits")
