"""Defines an execution provider of ONNX Runtime: its names, its origin, and the conversion of our settings to
its options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from ...errors import ProviderError, require_among
from ...registry import Registry

CPU = "CPUExecutionProvider"
"""ONNX Runtime's name of the provider that runs every node which no other provider takes."""


def _present() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Provider:
    """An execution provider: ``name`` is ours, ``runtime_name`` is ONNX Runtime's, and ``source`` names the
    wheel that contains it. ``plugin`` is the module of a wheel that adds it to any build of ONNX Runtime.

    ``settings`` converts each supported setting of a :class:`.Device` to options of the provider; ``options``
    are always set, and ``session`` holds attributes for the session's options. ``behind`` names providers
    that may run the nodes which this one leaves. Arrays stay in ``memory`` between runs, under ``OrtValue``'s
    name for it. ``absent`` returns what is missing on this machine, or None.
    """

    name: str
    runtime_name: str
    source: str
    plugin: str = ""
    memory: str = "cpu"
    settings: Mapping[str, Callable[[Any], Mapping[str, str]]] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)
    behind: tuple[str, ...] = ()
    absent: Callable[[], str | None] = _present

    @property
    def has_plugin(self) -> bool:
        """Whether the wheel with its plugin is installed."""
        return bool(self.plugin and find_spec(self.plugin))


PROVIDERS = Registry("provider", Provider, "adapterpack.providers", "adapterpack.runtime.providers")


def get_provider(name: str) -> Provider:
    """Returns the provider of that name.

    Raises:
        ProviderError: no provider has that name.
    """
    require_among("unknown provider", name, PROVIDERS, ProviderError)
    return PROVIDERS[name]
