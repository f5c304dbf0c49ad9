"""Collects the routes of a server: those of every API that its engine supports. Each module of ``apis``
registers one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, Unsupported
from ..registry import Registry
from ..runtime import Engine
from .observability import Figure
from .route import RouteSpec
from .tenants import ServerLimits


@dataclass(frozen=True)
class Api:
    """An API on one engine: its routes, its metrics of that engine, and a function that closes what it
    opened.
    """

    routes: tuple[RouteSpec, ...]
    figures: tuple[Figure, ...] = ()
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class ApiKind:
    """A kind of API. ``open`` makes it for an engine that it ``serves``; ``options`` are the keyword
    arguments that ``open`` takes besides.
    """

    name: str
    serves: Callable[[Engine], bool]
    open: Callable[..., Api]
    options: tuple[str, ...] = ()


APIS = Registry("API of a server", ApiKind, "adapterpack.apis", "adapterpack.serving.apis")
"""Name -> kind of API."""


def apis_of(engine: Engine, limits: ServerLimits, options: Mapping[str, Any]) -> list[Api]:
    """Opens all APIs that an engine supports.

    Raises:
        ConfigError: no API has one of the options.
        Unsupported: no route answers the bundle's task.
    """
    kinds = [kind for kind in APIS.values() if kind.serves(engine)]
    for name in options:
        if not any(name in kind.options for kind in kinds):
            raise ConfigError(
                "no route of this bundle has such an option",
                where=engine.bundle.folder,
                found=name,
                remedy="leave it out",
            )
    apis = [
        kind.open(engine, limits, **{name: options[name] for name in kind.options if name in options})
        for kind in kinds
    ]
    if not any(api.routes for api in apis):
        raise Unsupported(
            "no route answers this task",
            where=engine.bundle.folder,
            found=engine.bundle.task.name,
            remedy="use adapterpack.Engine or adapterpack run",
        )
    return apis
