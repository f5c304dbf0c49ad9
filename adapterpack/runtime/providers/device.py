"""Where and how a bundle's graphs run: one typed value. What it stands for in ONNX Runtime:
:mod:`.starting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ...errors import ConfigError, nearest

ARENAS = {"doubling": "kNextPowerOfTwo", "exact": "kSameAsRequested"}
"""How the memory of a card grows: to the next power of two, or by what is needed; and ONNX Runtime's name for
it.
"""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A provider with its settings. What is None is as the provider has it.

    ``provider`` is its name, by default ``cuda`` where there is a card and ``cpu`` elsewhere. ``device_id``
    is the number of the card, ``memory_limit`` the most bytes of its memory, and ``arena`` says whether that
    memory grows by ``doubling`` or by ``exact`` amounts. ``tf32`` allows products of float32 to round their
    factors to ten bits, which no provider does without it. ``capture`` records each kind of the engine's
    steps as a CUDA graph and replays it. ``threads`` are those of each graph's operators on the CPU;
    ``spinning`` says whether they wait busily for the next operator, which is fast where a session has its
    cores for itself. ``options`` are the provider's own, by its own names.

    A node that runs on the CPU in place of the provider is an error, or with ``allow_cpu_nodes`` a warning.

    Example:
        >>> Device(provider="cuda", memory_limit=8 << 30).tf32 is None
        True
        >>> Device(provider="cpu", arena="halving")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        adapterpack.errors.ConfigError: unknown kind of arena (found 'halving'). To fix it: Known: ...
    """

    provider: str | None = None
    device_id: int | None = None
    memory_limit: int | None = None
    arena: Literal["doubling", "exact"] | None = None
    tf32: bool | None = None
    capture: bool | None = None
    threads: int | None = None
    spinning: bool | None = None
    allow_cpu_nodes: bool = False
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.arena is not None and self.arena not in ARENAS:
            raise ConfigError(
                "unknown kind of arena", found=repr(self.arena), remedy=nearest(self.arena, ARENAS)
            )
        for name, least in (("device_id", 0), ("memory_limit", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{name} is a number from {least} on", found=repr(value))

    @classmethod
    def of(cls, provider: str | Device | None, threads: int | None = None) -> Device:
        """A device, or the one of that provider; ``threads`` wins where it is given."""
        device = provider if isinstance(provider, Device) else cls(provider=provider)
        return device if threads is None else replace(device, threads=threads)
