"""The manifest: what a pack is, in frozen dataclasses that mirror ``schemas/manifest.v1.json`` field by field."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import resources
from ..errors import FormatError
from . import strict_json

FILE_NAME = "adapterpack.json"
FORMAT_VERSION = "1.0"
MAX_BYTES = 4 << 20
FEATURES = frozenset({"int8"})
"""What this reader understands of ``must_understand``."""


@dataclass(frozen=True)
class PackInfo:
    """Names and claims about the pack itself."""

    name: str
    version: str = "0.1.0"
    description: str = ""


@dataclass(frozen=True)
class MethodRef:
    """Which method made the tensors."""

    type: str
    spec_version: int = 1


@dataclass(frozen=True)
class Task:
    """What the adapted model does: the Hugging Face pipeline name, the model class, and the labels in order."""

    type: str
    architecture: str | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Base:
    """The model that the pack belongs to: name and commit are hints, the digests are its identity."""

    name: str | None = None
    commit: str | None = None
    model_type: str | None = None
    structure: str | None = None
    content: str | None = None


@dataclass(frozen=True)
class Group:
    """One module that the pack changes. ``role`` is ``adapter``, or ``full`` for a module that was trained whole.

    ``weight`` is the literal name of the tensor in the base checkpoint; ``config`` holds the hyper-parameters that differ here from
    the manifest's ``config``; ``scale`` is the number that multiplies the branch.
    """

    path: str
    role: str = "adapter"
    kind: str = "linear"
    weight: str | None = None
    in_features: int | None = None
    out_features: int | None = None
    bias: bool = False
    rank: int | None = None
    scale: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: where it is, what it is, and the proof of its bytes. ``scales`` names the int8 tensor's scales."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    group: str
    param: str
    scales: str | None = None


@dataclass(frozen=True)
class FileEntry:
    """One file of the closed list."""

    path: str
    size: int
    sha256: str
    role: str


@dataclass(frozen=True)
class Parent:
    """A pack that this one was made from, by digest."""

    digest: str
    name: str
    weight: float | None = None


@dataclass(frozen=True)
class Lineage:
    """The operation that made this pack from its parents, with every parameter."""

    operation: str
    parents: tuple[Parent, ...]
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Canary:
    """An executable proof: these inputs must give these logits, without and with the adapter.

    ``base`` and ``adapter`` hold, row by row, the logits at the last position: ``ids`` (the top ones) and ``logits`` beside them. In
    ``base`` the pack's trained head is on and its adapters are off.
    """

    input_ids: tuple[tuple[int, ...], ...]
    base: tuple[Mapping[str, Any], ...]
    adapter: tuple[Mapping[str, Any], ...]
    tolerance: float
    dtype: str = "float32"


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. Everything from ``training`` on is claimed, not verifiable."""

    pack: PackInfo
    method: MethodRef
    config: Mapping[str, Any]
    task: Task
    base: Base
    groups: tuple[Group, ...]
    tensors: Mapping[str, TensorEntry]
    files: tuple[FileEntry, ...]
    lineage: Lineage | None = None
    quantization: Mapping[str, Any] | None = None
    canary: Canary | None = None
    safety: Mapping[str, bool] = field(default_factory=lambda: {"contains_code": False, "requires_remote_code": False})
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    license: str | None = None
    must_understand: tuple[str, ...] = ()
    extensions: Mapping[str, Any] = field(default_factory=dict)
    format: str = "adapterpack"
    format_version: str = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        encoded: dict[str, Any] = plain(self)
        return encoded

    def to_bytes(self) -> bytes:
        """The canonical bytes that go to disk; their sha256 is the pack's id."""
        return strict_json.canonical(self.to_json())

    @property
    def id(self) -> str:
        """``sha256:`` and the digest of the manifest's bytes."""
        return f"sha256:{hashlib.sha256(self.to_bytes()).hexdigest()}"


def parse(data: bytes, where: object) -> Manifest:
    """The manifest in ``data``, checked against the schema.

    Raises:
        FormatError: malformed, of another major version, or in need of a feature that this version does not have.
    """
    value = strict_json.loads(data, where, MAX_BYTES)
    if not isinstance(value, dict) or value.get("format") != "adapterpack":
        raise FormatError("this is not an adapterpack manifest", where=where, expected="format: adapterpack")
    major = str(value.get("format_version", "")).partition(".")[0]
    if major != FORMAT_VERSION.partition(".")[0]:
        raise FormatError("another major version of the format", where=where, expected="1.x", found=value.get("format_version"),
                          remedy="use a version of adapterpack that reads it")
    needs = value.get("must_understand")
    unknown = {str(feature) for feature in needs} - FEATURES if isinstance(needs, list) else set()
    if unknown:
        raise FormatError("the pack needs features that this version does not have", where=where, expected=", ".join(sorted(FEATURES)),
                          found=", ".join(sorted(unknown)), remedy="update adapterpack")
    problem = schema_problem(value, "manifest.v1")
    if problem:
        pointer, message = problem
        newer = value["format_version"] != FORMAT_VERSION
        raise FormatError(f"the manifest does not fit its schema: {message}", where=f"{where}#{pointer}",
                          remedy=f"it is of version {value['format_version']}: update adapterpack" if newer else None)
    return _decode(value)


def schema_problem(value: Any, name: str) -> tuple[str, str] | None:
    """The first violation of a shipped schema as (JSON pointer, message), or None."""
    from jsonschema import Draft202012Validator, ValidationError, validators  # noqa: PLC0415 - keeps the import of this module cheap

    def pattern(_: Any, expression: str, instance: Any, __: Any) -> Iterator[ValidationError]:
        # Every pattern is anchored; but Python's "$" would let a newline at the end pass, which the schema's "$" does not.
        if isinstance(instance, str) and not re.fullmatch(expression, instance):
            yield ValidationError(f"{instance!r} does not match {expression!r}")

    strict = validators.extend(Draft202012Validator, {"pattern": pattern})
    errors = strict(resources.schema(name)).iter_errors(value)
    first = min(errors, key=lambda error: list(map(str, error.absolute_path)), default=None)
    return None if first is None else ("/" + "/".join(map(str, first.absolute_path)), first.message[:300])


def _decode(value: dict[str, Any]) -> Manifest:
    lineage, canary, labels = value.get("lineage"), value.get("canary"), value["task"].get("labels")
    known = {f.name for f in dataclasses.fields(Manifest)}
    plain = {key: item for key, item in value.items() if key in known}
    return Manifest(
        **{
            **plain,
            "pack": PackInfo(**value["pack"]),
            "method": MethodRef(**value["method"]),
            "task": Task(**{**value["task"], "labels": None if labels is None else tuple(labels)}),
            "base": Base(**value["base"]),
            "groups": tuple(Group(**group) for group in value["groups"]),
            "tensors": {name: TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in value["tensors"].items()},
            "files": tuple(FileEntry(**entry) for entry in value["files"]),
            "lineage": lineage and Lineage(lineage["operation"], tuple(Parent(**p) for p in lineage["parents"]), lineage["params"]),
            "canary": canary and Canary(**{**canary, "input_ids": tuple(map(tuple, canary["input_ids"])),
                                           "base": tuple(canary["base"]), "adapter": tuple(canary["adapter"])}),
            "metrics": tuple(value.get("metrics", ())),
            "must_understand": tuple(value.get("must_understand", ())),
        }
    )


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON values."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
