"""Generates the JSON Schema of fleet manifests from their structs.

``python -m adapterpack.fleet.schema > schemas/fleet.v1.json`` updates the file.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ..io.typed_json import schema_of
from ..manifest.integrity import KEY, SCHEMA
from .manifest import FleetManifest


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of ``adapterfleet.json``.

    Example:
        >>> schema()["properties"]["members"]["maxItems"]
        10000
    """
    made = schema_of(FleetManifest, {})
    made["properties"][KEY] = {**SCHEMA}
    first = {"properties": {"format_version": {"const": "1.0"}}}
    made["allOf"] = [{"if": first, "then": {"properties": {KEY: False}}, "else": {"required": [KEY]}}]
    about = {
        "$id": "https://adapterpack.dev/schemas/fleet.v1.json",
        "title": "adapterpack fleet, version 1",
        "description": (
            "Many adapters of one base: shared bases at each site, a core for each member, and the proof of "
            "every byte."
        ),
    }
    return {
        "$schema": made["$schema"],
        **about,
        **{key: item for key, item in made.items() if key not in about},
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n")
