"""Files that ship with adapterpack: schemas, templates and the demo's data, in a wheel or in a source
checkout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_PACKAGE = Path(__file__).parent


def resource(relative: str) -> Path:
    """The path of a shipped file, for instance ``schemas/manifest.v1.json``.

    In a wheel these lie inside the package; in an editable install they lie at the root of the checkout.
    """
    inside = _PACKAGE / relative
    return inside if inside.exists() else _PACKAGE.parent / relative


@cache
def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of that name, for instance ``manifest.v1``."""
    loaded: dict[str, Any] = json.loads(resource(f"schemas/{name}.json").read_text("utf-8"))
    return loaded


def templates(package: str, escape: Callable[[object], Markup]) -> Environment:
    """The jinja2 environment of the folder ``templates`` of a package: every value goes through ``escape``,
    and a missing one is an error.

    ``escape`` makes text of anything safe in the format of the templates, and returns
    :class:`markupsafe.Markup` as it is.
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
