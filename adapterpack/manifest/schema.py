"""Makes the JSON Schema of manifests from their structs.

``python -m adapterpack.manifest.schema > schemas/manifest.v1.json`` writes it anew.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ..io.typed_json import schema_of
from .limits import DEFINITIONS
from .manifest import Manifest
from .parts import Metric, TrainingClaims


def schema() -> dict[str, Any]:
    """The JSON Schema of ``adapterpack.json``.

    Example:
        >>> schema()["properties"]["groups"]["maxItems"]
        50000
    """
    made = schema_of(Manifest, DEFINITIONS, [TrainingClaims, Metric])
    fields, parts = made["properties"], made["$defs"]
    fields["training"]["properties"] = parts.pop("TrainingClaims")["properties"]
    fields["metrics"]["items"]["properties"] = parts.pop("Metric")["properties"]
    fields["integrity"] = {"description": "The sha256 of the manifest's own bytes with this text empty; null where the version of the "
                                          "format has none.", "type": ["string", "null"], "pattern": "^[0-9a-f]{64}$"}
    made["required"].append("integrity")
    about = {"$id": "https://adapterpack.dev/schemas/manifest.v1.json", "title": "adapterpack manifest, version 1",
             "description": "One adapter on disk: what it is, what it belongs to, and the proof of every byte."}
    return {"$schema": made["$schema"], **about, **{key: item for key, item in made.items() if key not in about}}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n")
