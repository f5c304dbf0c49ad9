"""Files that ship with adapterpack: schemas and the demo's data, in a wheel or in a source checkout."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

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
