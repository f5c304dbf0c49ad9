"""Generates the part of the training schema that covers settings of methods and trainers, from the
registries.

``python tests/train_schema.py`` prints the schema, which ``make golden`` writes to ``schemas/train.v1.json``;
the settings of a run stay as they are written there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from adapterpack import resources
from adapterpack.adapter_methods import Method, methods
from adapterpack.adapter_methods.core.config import types_of_fields
from adapterpack.training.config.fields import PARTS, TrainConfig
from adapterpack.training.trainers.kind import TRAINERS, TrainerKind

Owner = Method | TrainerKind
"""A method or trainer, which has settings of its own."""

NUMBER, NAMES = {"$ref": "#/$defs/number"}, {"$ref": "#/$defs/names"}

DESCRIBED: dict[str, dict[str, Any]] = {
    "targets": {
        "description": "What is adapted: all-linear, all-experts, all-language; of blocks "
        "all-layers, all-blocks, all-attention, all-ffn; or names."
    },
    "modules_to_save": {
        "description": "Modules that are trained whole; a task's new head is always among them.",
        "anyOf": [{"type": "string"}, NAMES],
    },
    "dropout": {
        "description": "Dropout on the branch's input while training.",
        "minimum": 0,
        "exclusiveMaximum": 1,
    },
    "r": {"description": "The rank.", "minimum": 1},
    "alpha": {"description": "The branch is multiplied by alpha / r."},
    "use_rslora": {"description": "Multiply by alpha / sqrt(r) instead."},
    "init": {"description": "How A and B begin; adapterpack methods lists the initialisations."},
    "init_options": {"description": "Settings of the initialisation, by name."},
    "rank_pattern": {
        "description": "Other ranks for some modules, by name.",
        "additionalProperties": {"type": "integer", "minimum": 1},
    },
    "alpha_pattern": {"description": "Other alphas for some modules, by name."},
}
"""Descriptions and limits of hyper-parameters that many methods share."""


def schema() -> dict[str, Any]:
    """Returns the training schema with the settings of every registered method and trainer.

    Example:
        >>> schema()["properties"]["r"]["description"]
        'The rank.'
    """
    written = resources.schema("train.v1")
    fields = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in PARTS]
    properties = {key: written["properties"][key] for key in fields}
    used: dict[str, list[Owner]] = {}
    owners: list[Owner] = [*methods().values(), *TRAINERS.values()]
    for owner in owners:
        for field in dataclasses.fields(owner.config):
            used.setdefault(field.name, []).append(owner)
    for name, those in used.items():
        properties[name] = _property(name, those)
    entry = {
        "type": "object",
        "properties": {key: {"$ref": f"#/properties/{key}"} for key in properties},
        "required": ["name"],
        "additionalProperties": False,
    }
    return {
        **written,
        "properties": {**properties, "adapters": written["properties"]["adapters"]},
        "$defs": {**written["$defs"], "adapter": {**written["$defs"]["adapter"], **entry}},
    }


def _property(name: str, those: list[Owner]) -> dict[str, Any]:
    """Returns the schema of one setting, which several methods may have with different types and defaults."""
    fields = [
        next(field for field in dataclasses.fields(method.config) if field.name == name) for method in those
    ]
    kinds = [_kind(types_of_fields(method.config)[name]) for method in those]
    described = DESCRIBED.get(name, {})
    different = [kind for number, kind in enumerate(kinds) if kind not in kinds[:number]]
    kind = (
        different[0]
        if len(different) == 1
        else {"anyOf": [one for every in different for one in every.get("anyOf", [every])]}
    )
    defaults = [
        field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        for field in fields
    ]
    common = (
        {"default": _plain(defaults[0])}
        if all(_plain(one) == _plain(defaults[0]) for one in defaults)
        else {}
    )
    # A default may be below the minimum: OFT has block sizes instead of a rank.
    if "minimum" in described:
        described = {
            **described,
            "minimum": min(
                [described["minimum"], *(one for one in defaults if isinstance(one, int | float))]
            ),
        }
    if "anyOf" in described:  # wider than the type: the reader takes one name for a list of one
        kind = {}
    return {
        "description": f"A setting of {', '.join(method.name for method in those)}.",
        **kind,
        **described,
        **common,
    }


def _kind(hint: Any) -> dict[str, Any]:
    """Returns the schema of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in {types.UnionType, typing.Union}:
        return {"anyOf": [_kind(one) for one in arguments]}
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        inner = _kind(arguments[1])
        return {"type": "object", **({"additionalProperties": inner} if inner else {})}
    if origin is tuple:
        return NAMES if arguments[0] is str else {"type": "array", "items": _kind(arguments[0])}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    plain_types: dict[Any, dict[str, Any]] = {
        str: {"type": "string"},
        int: {"type": "integer"},
        bool: {"type": "boolean"},
        float: NUMBER,
        type(None): {"type": "null"},
    }
    return plain_types.get(hint, {})


def _plain(value: Any) -> Any:
    """Returns a default as a JSON value."""
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n")
