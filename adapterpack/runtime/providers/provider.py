"""What an execution provider of ONNX Runtime is: its names, where it comes from, and how settings of ours
become options of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import ProviderError, nearest
from ...registry import Registry

CPU = "CPUExecutionProvider"
"""ONNX Runtime's name of the provider that takes every node that no other has taken."""


def _present() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Provider:
    """An execution provider: ``name`` is ours, ``runtime_name`` ONNX Runtime's, and ``source`` says which
    wheel has it.

    ``settings`` makes the provider's options of the settings of a :class:`.Device` that it has; ``options``
    are given always, and ``session`` are attributes of the session's options. ``behind`` are providers that
    may take what this one leaves. Arrays stay in ``memory`` between runs, by the name that ``OrtValue`` has
    for it. ``absent`` says what is missing on this machine, or nothing.
    """

    name: str
    runtime_name: str
    source: str
    memory: str = "cpu"
    settings: Mapping[str, Callable[[Any], Mapping[str, str]]] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, Any] = field(default_factory=dict)
    behind: tuple[str, ...] = ()
    absent: Callable[[], str | None] = _present


PROVIDERS: Registry[Provider] = Registry(
    "provider", Provider, "adapterpack.providers", "adapterpack.runtime.providers"
)


def get_provider(name: str) -> Provider:
    """The provider of that name.

    Raises:
        ProviderError: there is none.
    """
    provider = PROVIDERS.find(name)
    if provider is None:
        raise ProviderError("unknown provider", found=repr(name), remedy=nearest(name, PROVIDERS))
    return provider
