"""Finds files that ship with adapterpack (schemas, templates, the demo's data), in a wheel or in a source
checkout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_PACKAGE = Path(__file__).parent
T = TypeVar("T")


def resource(relative: str) -> Path:
    """Returns the path of a shipped file, for instance ``schemas/manifest.v1.json``.

    In a wheel these files are inside the package; in an editable install they are at the root of the
    checkout.
    """
    inside = _PACKAGE / relative
    return inside if inside.exists() else _PACKAGE.parent / relative


@cache
def schema(name: str) -> dict[str, Any]:
    """Returns the JSON Schema of that name, for instance ``manifest.v1``."""
    loaded: dict[str, Any] = json.loads(resource(f"schemas/{name}.json").read_text("utf-8"))
    return loaded


def table(relative: str, kind: type[T]) -> T:
    """Returns the contents of a shipped TOML file as that type."""
    return msgspec.toml.decode(resource(relative).read_bytes(), type=kind)


def templates(package: str, escape: Callable[[object], Markup]) -> Environment:
    """Returns the jinja2 environment of a package's ``templates`` folder: every value passes through
    ``escape``, and a missing value is an error.

    ``escape`` makes any text safe for the format of the templates, and returns :class:`markupsafe.Markup`
    unchanged.
    """
    # only what writes a page or a card needs it
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415

    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
    )
