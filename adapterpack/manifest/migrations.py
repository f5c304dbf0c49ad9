"""Manifests of other minor versions, made readable in memory; the bytes on disk, and with them the pack's id, stay what they are.

An older one goes through the numbered steps. A newer one loses the fields that this version does not know: what may not be ignored
is named in ``must_understand``, which is checked first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import FormatError

Step = Callable[[dict[str, Any]], dict[str, Any]]


class Upgrade(NamedTuple):
    """One step: the version that it makes, and how."""

    to: str
    apply: Step


def _with(value: Mapping[str, Any], added: Mapping[str, Any], pointer: str) -> dict[str, Any]:
    for key in added:
        if key in value:
            raise FormatError("the manifest holds a field that its format_version does not have", where=f"{pointer}/{key}",
                              remedy="pack the adapter again")
    return {**value, **added}


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _from_1_0(value: dict[str, Any]) -> dict[str, Any]:
    """1.1 adds authors and time, more of the base, tokenizer digests, the base's quantization, and details of lineage and license."""
    new = _with(value, {"tokenizer": None, "base_quantization": None, "base_license": None, "license_link": None,
                        "license_sha256": None}, "")
    if _object(new.get("pack")):
        new["pack"] = _with(new["pack"], {"authors": [], "created": None}, "/pack")
    if _object(new.get("base")):
        new["base"] = _with(new["base"], {"architecture": None, "dims": None, "files": None, "probe": None, "variants": []}, "/base")
    lineage = new.get("lineage")
    if isinstance(lineage, dict):
        new["lineage"] = _with(lineage, {"tool": None, "seed": None, "source_format": None, "ancestors": {}}, "/lineage")
        if isinstance(lineage.get("parents"), list):
            new["lineage"]["parents"] = [
                _with(parent, {"repo": None, "commit": None}, f"/lineage/parents/{number}") if _object(parent) else parent
                for number, parent in enumerate(lineage["parents"])
            ]
    return new


def _from_1_1(value: dict[str, Any]) -> dict[str, Any]:
    """1.2 adds the composition, a group's own method, and canaries of images and of decoders."""
    new = _with(value, {"composition": None}, "")
    groups, canary = value.get("groups"), value.get("canary")
    if isinstance(groups, list):
        new["groups"] = [_with(group, {"method": None}, f"/groups/{number}") if _object(group) else group
                         for number, group in enumerate(groups)]
    if isinstance(canary, dict):
        new["canary"] = _with(canary, {"decoder_input_ids": None, "pixels": None}, "/canary")
    return new


def _from_1_2(value: dict[str, Any]) -> dict[str, Any]:
    """1.3 adds canaries of speech."""
    canary = value.get("canary")
    return {**value, "canary": _with(canary, {"features": None}, "/canary")} if isinstance(canary, dict) else value


def _from_1_3(value: dict[str, Any]) -> dict[str, Any]:
    """1.4 adds the manifest's digest of itself, which an older one does without."""
    return _with(value, {"integrity": None}, "")


STEPS: dict[str, Upgrade] = {"1.0": Upgrade("1.1", _from_1_0), "1.1": Upgrade("1.2", _from_1_1), "1.2": Upgrade("1.3", _from_1_2),
                             "1.3": Upgrade("1.4", _from_1_3)}
"""Version -> the step out of it."""


def upgraded(value: dict[str, Any]) -> dict[str, Any]:
    """The manifest in the newest version that the steps reach; ``value`` itself is not changed.

    Raises:
        FormatError: a field of a later version stands in an older manifest.
    """
    while (step := STEPS.get(str(value.get("format_version")))) is not None:
        value = {**step.apply(dict(value)), "format_version": step.to}
    return value
