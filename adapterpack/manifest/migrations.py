"""Upgrades manifests of other minor versions in memory; the bytes on disk, and with them the pack's id, do
not change.

An older manifest passes through the numbered steps. A newer one loses the fields that this version does not
know: whatever must not be ignored is named in ``must_understand``, which is checked first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FormatError, Unsupported, excerpt
from ..io import Json

EACH = "[]"
"""In a place: every item of a list."""


class Upgrade(NamedTuple):
    """One step: the version that it produces, a description, and the fields that it adds to the objects at a
    place, with the values that stand for their absence. A place is the sequence of keys that leads there.
    """

    to: str
    adds: str
    fields: Mapping[tuple[str, ...], Mapping[str, Any]]


STEPS = {
    version: Upgrade(
        step["to"],
        step["adds"],
        {tuple(filter(None, place.split("/"))): fields for place, fields in step["fields"].items()},
    )
    for version, step in json.loads((Path(__file__).parent / "migrations.json").read_text("utf-8")).items()
}
"""Version -> the step that upgrades it."""


def upgrade(value: Json) -> Json:
    """Returns the manifest in the newest version that the steps reach; ``value`` itself is not changed.

    Raises:
        FormatError: an older manifest contains a field of a later version.
    """
    while (step := STEPS.get(str(value.get("format_version")))) is not None:
        for place, fields in step.fields.items():
            value = _with(value, place, fields, "")
        value = {**value, "format_version": step.to}
    return value


def refuse_layer_replication(ranges: Any, where: object) -> None:
    """Refuses an adapter of a base whose blocks are repeated: PEFT's ``layer_replication``, or
    ``repeated_layers`` in packs of earlier versions.

    Raises:
        Unsupported: ``ranges`` names blocks to repeat.
    """
    if ranges:
        raise Unsupported(
            "the adapter repeats blocks of its base (PEFT's layer_replication), which is not supported",
            where=where,
            found=excerpt(ranges),
            remedy="write the repeated blocks out into a checkpoint (mergekit's passthrough merge) and take "
            "layer_replication out of adapter_config.json: the adapter is then an ordinary one of that "
            "checkpoint",
        )


def _with(value: Any, place: tuple[str, ...], added: Mapping[str, Any], pointer: str) -> Any:
    """Returns a value with fields added to the objects at a place. A value of another type is returned
    unchanged; the type check refuses it later.
    """
    if not isinstance(value, list if place[:1] == (EACH,) else dict):
        return value
    if isinstance(value, list):
        return [_with(item, place[1:], added, f"{pointer}/{number}") for number, item in enumerate(value)]
    if place:
        key = place[0]
        return (
            {**value, key: _with(value[key], place[1:], added, f"{pointer}/{key}")} if key in value else value
        )
    for key in added:
        if key in value:
            raise FormatError(
                "the manifest holds a field that its format_version does not have",
                where=f"{pointer}/{key}",
                remedy="pack the adapter again",
            )
    return {**value, **added}
