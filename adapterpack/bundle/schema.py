"""Generates the JSON Schema of bundle manifests from their dataclasses.

``python -m adapterpack.bundle.schema > schemas/bundle.v1.json`` regenerates the published file.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ..io.typed_json import schema_of
from .manifest import OPTIONAL, Bundle
from .reports import CanaryReport, DecoderReport, QuantizationReport

_REPORTS = (CanaryReport, DecoderReport, QuantizationReport)


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of ``adapterpack.bundle.json``.

    Example:
        >>> schema()["properties"]["sites"]["maxProperties"]
        50000
    """
    made = schema_of(Bundle, {}, _REPORTS)
    fields, parts = made["properties"], made["$defs"]
    fields["quantization"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/QuantizationReport"}]}
    fields["parity"]["properties"] = {
        "canary": {"$ref": "#/$defs/CanaryReport"},
        "decoder": {"$ref": "#/$defs/DecoderReport"},
    }
    for name, optional in OPTIONAL.items():
        part = made if name == "Bundle" else parts[name]
        part["required"] = [field for field in part["required"] if field not in optional]
    about = {
        "$id": "https://adapterpack.dev/schemas/bundle.v1.json",
        "title": "adapterpack bundle, version 1",
        "description": "One deployable folder: graph, site map, adapters, tokenizer.",
    }
    return {
        "$schema": made["$schema"],
        **about,
        **{key: item for key, item in made.items() if key not in about},
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n")
