"""Defines what a check receives: the pack, the bytes of its files, the base, and the remaining time and
memory.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from ....base import Checkpoint
from ....io import SafetensorsFile
from ....manifest import Manifest
from ... import Pack
from .finding import Finding

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
        adapterpack.pack.validate.checks.context.Spent: the values: the time ran out
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


class Subject(NamedTuple):
    """The pack, the bytes of its files by name, its tensor file over those bytes, and the base, if one was
    given.

    Checks read nothing from ``folder``; it is only for messages. ``allow_structural`` accepts a base by its
    structure.
    """

    folder: Path
    pack: Pack
    file: SafetensorsFile
    file_bytes: Mapping[str, bytes]
    base: Checkpoint | None
    full: bool
    budget: Budget
    allow_structural: bool = False

    @property
    def manifest(self) -> Manifest:
        """The manifest of the pack."""
        return self.pack.manifest

    def require_memory(self, size: int, what: str) -> None:
        """Checks that ``size`` bytes may be held in addition to the files.

        Raises:
            Spent: that exceeds the limit.
        """
        self.budget.require_memory(sum(map(len, self.file_bytes.values())) + size, what)


Check = Callable[[Subject], Iterator[Finding]]


def quantized_numbers(manifest: Manifest) -> Counter[str]:
    """Returns how many numbers of each group are stored as codes: decoding them to float32 takes memory in
    addition to the file's.
    """
    numbers = Counter[str]()
    for name, entry in manifest.tensors.items():
        if entry.scales is not None or name in manifest.packed:
            numbers[entry.group] += math.prod(manifest.shape_of(name))
    return numbers


def group_pointer(number: int) -> str:
    """Returns the JSON pointer to a group."""
    return f"/groups/{number}"


def tensor_pointer(name: str) -> str:
    """Returns the JSON pointer to a tensor's entry (RFC 6901)."""
    return "/tensors/" + name.replace("~", "~0").replace("/", "~1")
