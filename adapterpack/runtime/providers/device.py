"""The device on which a bundle's graphs run, as one typed value; :mod:`.resolved_device` turns it into ONNX
Runtime's options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ...errors import ConfigError, require_among

ARENAS = {"doubling": "kNextPowerOfTwo", "exact": "kSameAsRequested"}
"""How GPU memory grows, to the next power of two or by the exact need -> ONNX Runtime's name of the strategy.
"""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A provider with its settings; None leaves a setting at the provider's default.

    ``provider`` is a name, by default ``cuda`` if there is a GPU and ``cpu`` otherwise. ``device_id`` is the
    number of the GPU, ``memory_limit`` the most bytes of its memory, and ``arena`` whether that memory grows
    by ``doubling`` or by ``exact`` amounts. ``tf32`` permits float32 products to round their factors to ten
    bits; by default no provider does. ``capture`` records each shape of the engine's steps as a CUDA graph
    and replays it. ``threads`` is the number of threads of each operator on the CPU; with ``spinning`` they
    busy-wait for the next operator, which is fast if the session has its cores to itself. ``options`` are
    passed to the provider under its own names.

    A node that runs on the CPU instead of the provider is an error, or with ``allow_cpu_nodes`` a warning.

    Example:
        >>> Device(provider="cuda", memory_limit=8 << 30).tf32 is None
        True
        >>> Device(provider="cpu", arena="halving")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        adapterpack.errors.ConfigError: unknown kind of arena (found 'halving'). To fix it: use a ...
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
        require_among("unknown kind of arena", self.arena, ARENAS, ConfigError)
        for name, least in (("device_id", 0), ("memory_limit", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{name} is a number from {least} on", found=repr(value))

    @classmethod
    def of(cls, provider: str | Device | None, threads: int | None = None) -> Device:
        """Returns a device as it is, or the device of a provider name. ``threads`` overrides its threads if
        it is given.
        """
        device = provider if isinstance(provider, Device) else cls(provider=provider)
        return device if threads is None else replace(device, threads=threads)
