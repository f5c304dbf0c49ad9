"""What a check looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...io.safetensors import SafetensorsFile
from ..pack import Pack
from .budget import Budget
from .finding import Finding

if TYPE_CHECKING:
    from ...base.checkpoint import Checkpoint


class Subject(NamedTuple):
    """The pack, the bytes of its files by name, its tensor file over those bytes, the base if one was named.

    Nothing is read from ``folder`` any more: it is there for messages. ``allow_structural`` is the leave for a base by its structure.
    """

    folder: Path
    pack: Pack
    file: SafetensorsFile
    held: Mapping[str, bytes]
    base: Checkpoint | None
    full: bool
    budget: Budget
    allow_structural: bool = False


Check = Callable[[Subject], Iterator[Finding]]


def group_pointer(number: int) -> str:
    """The JSON pointer to a group."""
    return f"/groups/{number}"


def tensor_pointer(name: str) -> str:
    """The JSON pointer to a tensor's entry (RFC 6901)."""
    return "/tensors/" + name.replace("~", "~0").replace("/", "~1")
