"""Keeps the hooks that serve an adapter on its model until the adapter is removed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_ATTRIBUTE = "_adapterpack_observers"
"""The attribute of a model that maps the names of its adapters to their observers."""


class Observer:
    """Hooks on a model and its parts, which see what passes through."""

    handles: list[Any]

    @property
    def unused(self) -> list[str]:
        """The paths of layers that were not called although the modules that contain them were."""
        return []

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self.handles:
            handle.remove()


def observe(model: nn.Module, adapter: str, observer: Observer) -> None:
    """Keeps an observer until :func:`stop_observing`."""
    model.__dict__.setdefault(_ATTRIBUTE, {}).setdefault(adapter, []).append(observer)


def unused_of(model: nn.Module, adapter: str) -> frozenset[str]:
    """Returns the paths of an adapter's layers that the model has not called so far although it called their
    owners.
    """
    observers = model.__dict__.get(_ATTRIBUTE, {}).get(adapter, ())
    return frozenset(path for observer in observers for path in observer.unused)


def stop_observing(model: nn.Module, adapters: Iterable[str]) -> None:
    """Removes all hooks that serve these adapters."""
    for adapter in adapters:
        for observer in model.__dict__.get(_ATTRIBUTE, {}).pop(adapter, ()):
            observer.close()
