"""Generates the JSON Schemas of manifests, bundles, fleets and canaries from their structs:
``python tests/format_schemas.py manifest > schemas/manifest.v1.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from adapterpack.bundle.manifest import OPTIONAL, Bundle
from adapterpack.bundle.reports import CanaryReport, DecoderReport, ProofReport, QuantizationReport
from adapterpack.fleet.manifest import FleetManifest
from adapterpack.io.typed_json import portable
from adapterpack.manifest import structs
from adapterpack.manifest.integrity import KEY
from adapterpack.manifest.manifest import Manifest
from adapterpack.manifest.migrations import EACH, STEPS
from adapterpack.manifest.structs import Metric, TrainingClaims
from adapterpack.pack.revoked import Revocations

_INTEGRITY = {
    "description": "The sha256 of the manifest's own bytes with this text empty.",
    "type": "string",
    "pattern": "^[0-9a-f]{64}$",
}


def _values(name: str, description: str, largest: float) -> dict[str, Any]:
    inner = {"$ref": f"#/$defs/{name}"}
    return {
        name: {
            "description": description,
            "type": ["null", "boolean", "string", "number", "array", "object"],
            "maxLength": structs.MAX_TEXT,
            "minimum": -largest,
            "maximum": largest,
            "items": inner,
            "maxItems": structs.MAX_ITEMS,
            "maxProperties": structs.MAX_KEYS,
            "propertyNames": {"type": "string", "maxLength": 512},
            "additionalProperties": inner,
        }
    }


_DEFINITIONS = {
    **_values(
        "setting",
        "A value that a method or a node computes with, of any kind that JSON has.",
        structs.LARGEST_SETTING,
    ),
    **_values(
        "claim", "A value that nothing computes with, of any kind that JSON has.", structs.LARGEST_CLAIM
    ),
}
"""The JSON Schema of what ``too_large`` checks."""


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema of ``adapterpack.json``.

    Example:
        >>> manifest_schema()["properties"]["groups"]["maxItems"]
        50000
    """
    made = schema_of(Manifest, _DEFINITIONS, [TrainingClaims, Metric])
    fields, parts = made["properties"], made["$defs"]
    fields["training"]["properties"] = parts.pop("TrainingClaims")["properties"]
    fields["metrics"]["items"]["properties"] = parts.pop("Metric")["properties"]
    fields[KEY] = {**_INTEGRITY}
    made["allOf"] = _by_version(made)
    return _with_title(
        made,
        "manifest",
        "adapterpack manifest, version 1",
        "One adapter on disk: what it is, what it belongs to, and the proof of every byte.",
    )


def canary_schema() -> dict[str, Any]:
    """The JSON Schema of a manifest's canary, for formats of others that carry one.

    Example:
        >>> canary_schema()["properties"]["adapter"]["maxItems"]
        16
    """
    return _with_title(
        schema_of(structs.Canary, {}),
        "canary",
        "adapterpack canary, version 1",
        "Inputs, and the logits that a base and an adapter must give on them (docs/canary.md).",
    )


def bundle_schema() -> dict[str, Any]:
    """The JSON Schema of ``adapterpack.bundle.json``.

    Example:
        >>> bundle_schema()["properties"]["sites"]["maxProperties"]
        50000
    """
    made = schema_of(Bundle, {}, (CanaryReport, DecoderReport, ProofReport, QuantizationReport))
    fields, parts = made["properties"], made["$defs"]
    fields["quantization"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/QuantizationReport"}]}
    fields["parity"]["properties"] = {
        "canary": {"$ref": "#/$defs/CanaryReport"},
        "decoder": {"$ref": "#/$defs/DecoderReport"},
        "proof": {"$ref": "#/$defs/ProofReport"},
    }
    for name, optional in OPTIONAL.items():
        part = made if name == "Bundle" else parts[name]
        part["required"] = [field for field in part["required"] if field not in optional]
    return _with_title(
        made,
        "bundle",
        "adapterpack bundle, version 1",
        "One deployable folder: graph, site map, adapters, tokenizer.",
    )


def fleet_schema() -> dict[str, Any]:
    """The JSON Schema of ``adapterfleet.json``.

    Example:
        >>> fleet_schema()["properties"]["members"]["maxItems"]
        10000
    """
    made = schema_of(FleetManifest, {})
    made["properties"][KEY] = {**_INTEGRITY}
    first = {"properties": {"format_version": {"const": "1.0"}}}
    made["allOf"] = [{"if": first, "then": {"properties": {KEY: False}}, "else": {"required": [KEY]}}]
    return _with_title(
        made,
        "fleet",
        "adapterpack fleet, version 1",
        "Many adapters of one base: shared bases at each site, a core for each member, and the proof of "
        "every byte.",
    )


def revoked_schema() -> dict[str, Any]:
    """The JSON Schema of a list of what was revoked.

    Example:
        >>> revoked_schema()["required"]
        ['format', 'version', 'entries']
    """
    return _with_title(
        schema_of(Revocations, {}),
        "revoked",
        "adapterpack list of revocations, version 1",
        "The sha256 of packs, bundles, files, tensors and signers' keys that are refused, each with the reason.",
    )


def _with_title(made: dict[str, Any], name: str, title: str, description: str) -> dict[str, Any]:
    about = {
        "$id": f"https://adapterpack.dev/schemas/{name}.v1.json",
        "title": title,
        "description": description,
    }
    rest = {key: item for key, item in made.items() if key not in about}
    return {"$schema": made["$schema"], **about, **rest}


def schema_of(kind: type[Any], others: Mapping[str, Any], more: Sequence[Any] = ()) -> dict[str, Any]:
    """Returns the JSON Schema (2020-12) of a struct, with definitions of its parts, of the types in ``more``,
    and of ``others``.
    """
    (schema, *_), parts = msgspec.json.schema_components([kind, *more], ref_template="#/$defs/{name}")
    root = parts.pop(schema["$ref"].rpartition("/")[2])
    written: dict[str, Any] = _write_schema(
        portable({**root, "$defs": {**{name: parts[name] for name in sorted(parts)}, **others}})
    )
    for name, absent in _absent(msgspec.inspect.multi_type_info([kind, *more]), set()):
        part = written["$defs"][name]
        part["required"] = [field for field in part["required"] if field not in absent]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **written}


def _absent(info: Any, seen: set[type[Any]]) -> Iterator[tuple[str, set[str]]]:
    """Yields the name of every typed mapping in a type, with the keys that it may lack."""
    if isinstance(info, tuple):
        for item in info:
            yield from _absent(item, seen)
    elif (
        isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field)
        and (cls := getattr(info, "cls", None)) not in seen
    ):
        if isinstance(info, msgspec.inspect.TypedDictType):
            yield info.cls.__name__, {field.name for field in info.fields if not field.required}
        if cls is not None:
            seen.add(cls)
        for attribute in type(info).__struct_fields__:
            yield from _absent(getattr(info, attribute), seen)


def _write_schema(schema: Any) -> Any:
    """Normalises a generated schema: every field is required, no other is allowed, and choices have a fixed
    order.
    """
    if isinstance(schema, list):
        return [_write_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    written = {key: _write_schema(item) for key, item in schema.items() if key != "default"}
    if isinstance(described := written.get("description"), str):
        written["description"] = " ".join(described.split())
    if isinstance(choices := written.get("anyOf"), list):
        written["anyOf"] = sorted(
            choices, key=lambda choice: (choice == {"type": "null"}, repr(sorted(choice.items())))
        )
    if isinstance(names := written.get("propertyNames"), dict):
        written["propertyNames"] = {"type": "string", **names}
    if isinstance(written.get("properties"), dict) and "additionalProperties" not in written:
        written |= {"required": list(written["properties"]), "additionalProperties": False}
    return written


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


SCHEMAS = {
    "manifest": manifest_schema,
    "bundle": bundle_schema,
    "fleet": fleet_schema,
    "canary": canary_schema,
    "revoked": revoked_schema,
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(SCHEMAS[sys.argv[1]](), indent=2, ensure_ascii=False) + "\n")
