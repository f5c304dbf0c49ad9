"""Generates the JSON Schema of manifests from their structs and from what each version of the format added.

``python -m adapterpack.manifest.schema > schemas/manifest.v1.json`` updates the file.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ..io.typed_json import schema_of
from .integrity import KEY, SCHEMA
from .limits import DEFINITIONS
from .manifest import Manifest
from .migrations import EACH, STEPS
from .structs import Metric, TrainingClaims


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of ``adapterpack.json``.

    Example:
        >>> schema()["properties"]["groups"]["maxItems"]
        50000
    """
    made = schema_of(Manifest, DEFINITIONS, [TrainingClaims, Metric])
    fields, parts = made["properties"], made["$defs"]
    fields["training"]["properties"] = parts.pop("TrainingClaims")["properties"]
    fields["metrics"]["items"]["properties"] = parts.pop("Metric")["properties"]
    fields[KEY] = {**SCHEMA}
    made["allOf"] = _by_version(made)
    about = {
        "$id": "https://adapterpack.dev/schemas/manifest.v1.json",
        "title": "adapterpack manifest, version 1",
        "description": "One adapter on disk: what it is, what it belongs to, and the proof of every byte.",
    }
    return {
        "$schema": made["$schema"],
        **about,
        **{key: item for key, item in made.items() if key not in about},
    }


def _by_version(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns rules for the fields of each later version: manifests of older versions lack them, all others
    have them.
    """
    rules, older = [], []
    for version, step in STEPS.items():
        older.append(version)
        for place, added in step.fields.items():
            part = part_at(made, place)
            part["required"] = [field for field in part["required"] if field not in added]
            rules.append(
                {
                    "if": {"properties": {"format_version": {"enum": [*older]}}},
                    "then": _inside(place, {"properties": dict.fromkeys(added, False)}),
                    "else": _inside(place, {"required": [*added]}),
                }
            )
    return rules


def part_at(made: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """Returns the part of a schema that describes the objects at a place."""
    part = made
    for key in place:
        part = part["items"] if key == EACH else part["properties"][key]
        part = part.get("anyOf", [part])[0]  # the other alternative is null
        part = made["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
    return part


def _inside(place: tuple[str, ...], rule: dict[str, Any]) -> dict[str, Any]:
    """Wraps a rule for the objects at a place so that it applies from the top of the document."""
    for key in reversed(place):
        rule = {"items": rule} if key == EACH else {"properties": {key: rule}}
    return rule


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n")
