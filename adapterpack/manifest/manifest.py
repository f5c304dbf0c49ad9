"""The manifest: what a pack is, in frozen dataclasses that mirror ``schemas/manifest.v1.json`` field by field.

Those that most packs do without are in :mod:`.manifest_parts`, which is imported where there is one: every dataclass costs a command half
a millisecond.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from .. import resources
from ..errors import FormatError
from ..io import strict_json
from ..io.plain import plain as plain  # noqa: PLC0414 - a name of this module too
from ..io.schema_check import schema_problem
from .migrations import pruned, upgraded

if TYPE_CHECKING:
    from .parts import BaseQuantization, Canary, Composition, Dims, Tokenizer, Variant

FILE_NAME = "adapterpack.json"
FORMAT_VERSION = "1.4"
MAX_BYTES = 4 << 20
LARGEST_WEIGHT = 1 << 33
"""Numbers in the weight of one layer: an output head of 16384 by half a million."""
MOST_SETTINGS = 1 << 20
"""Values in the hyper-parameters of all sites together: the common ones are read anew for every site that has some of its own."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""The names that a pack may have; the schema says the same."""
METHODS = "methods"
"""The feature of a pack in which a group has a method that is not the pack's."""
FEATURES = frozenset({"int8", METHODS, "composition"})
"""What this reader understands of ``must_understand``."""
_INTEGRITY = b'\n  "integrity": "'
"""What stands before the digest in canonical bytes, and nowhere else: a text holds no line break."""
_FIRST_SEALED = 4
"""The first minor version whose manifests hold a digest of themselves."""


@dataclass(frozen=True)
class PackInfo:
    """Names and claims about the pack itself; ``created`` is RFC 3339."""

    name: str
    version: str = "0.1.0"
    description: str = ""
    authors: tuple[str, ...] = ()
    created: str | None = None


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
    """The model that the pack belongs to: name, commit, architecture and sizes are hints, the digests are its identity.

    ``structure``, ``files``, ``content`` and ``probe`` are the four levels of the fingerprint, each may be unknown.
    """

    name: str | None = None
    commit: str | None = None
    model_type: str | None = None
    structure: str | None = None
    content: str | None = None
    architecture: str | None = None
    dims: Dims | None = None
    files: str | None = None
    probe: str | None = None
    variants: tuple[Variant, ...] = ()


@dataclass(frozen=True)
class Group:
    """One module that the pack changes. ``role`` is ``adapter``, or ``full`` for a module that was trained whole; the one group of role
    ``shared`` is no module and holds what all adapters of the pack have in common. A width may be unknown (None).

    ``weight`` is the literal name of the tensor in the base checkpoint; ``config`` holds the hyper-parameters that differ here from
    the manifest's ``config``; ``scale`` is the number that multiplies the branch. A ``method`` of its own stands where it is not the
    pack's; the group's ``config`` is then the whole.
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
    method: MethodRef | None = None


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
    """A pack that this one was made from, by digest; ``repo`` and ``commit`` say where it was found."""

    digest: str
    name: str
    weight: float | None = None
    repo: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Lineage:
    """The operation that made this pack from its parents, with every parameter.

    ``tool`` is name and version; ``source_format`` what a converted pack was before; ``ancestors`` the parents of the parents, pack
    digest to pack digests, as far as they are known.
    """

    operation: str
    parents: tuple[Parent, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    tool: str | None = None
    seed: int | None = None
    source_format: str | None = None
    ancestors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. ``training``, ``metrics``, the licenses and what ``pack`` says are claimed, not verifiable.

    A manifest that was read keeps its bytes: they are its identity, whatever version of the format they are in.
    """

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
    tokenizer: Tokenizer | None = None
    base_quantization: BaseQuantization | None = None
    base_license: str | None = None
    license_link: str | None = None
    license_sha256: str | None = None
    composition: Composition | None = None

    _raw: ClassVar[bytes | None] = None  # set on the instance by parse; no field, so that a changed copy does not inherit it

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return {**plain(self), "integrity": self.integrity}

    def to_bytes(self) -> bytes:
        """The bytes it was read from, else the canonical bytes that go to disk; their sha256 is the pack's id."""
        return self._raw if self._raw is not None else self._canonical

    @cached_property
    def _canonical(self) -> bytes:
        return sealed({each.name: getattr(self, each.name) for each in dataclasses.fields(self)})

    @cached_property
    def integrity(self) -> str:
        """The digest that the canonical bytes hold of themselves."""
        return _integrity(self._canonical)[1]

    @cached_property
    def id(self) -> str:
        """``sha256:`` and the digest of the manifest's bytes."""
        return f"sha256:{hashlib.sha256(self.to_bytes()).hexdigest()}"


def sealed(value: Mapping[str, Any]) -> bytes:
    """The canonical bytes of a manifest's fields, with ``integrity``: the sha256 of these very bytes without that digest in them.

    It says that no byte was changed by accident, on a disk or on the way. Whoever changes a manifest on purpose can make it anew: that is
    what signatures and pinned ids are for.
    """
    data = strict_json.canonical({**value, "integrity": ""})
    end = data.index(_INTEGRITY) + len(_INTEGRITY)
    return data[:end] + hashlib.sha256(data).hexdigest().encode() + data[end:]


def _integrity(data: bytes) -> tuple[str, str]:
    """The digest that canonical bytes must hold of themselves, and the one that they do."""
    end = data.find(_INTEGRITY) + len(_INTEGRITY)
    said, rest = data[end : end + 64], data[end + 64 :]
    return hashlib.sha256(data[:end] + rest).hexdigest(), said.decode("utf-8", "replace")


def parse(data: bytes, where: object) -> Manifest:
    """The manifest in ``data``, checked against the schema and its own digest.

    Raises:
        FormatError: malformed, altered, of another major version, or in need of a feature that this version does not have.
    """
    value = _read(data, where)
    if strict_json.canonical(value) != data:
        raise FormatError("the manifest is not in its canonical form: it was edited by hand", where=where, remedy="pack the adapter again")
    manifest = _decode(_current(value, where))
    object.__setattr__(manifest, "_raw", data)
    return manifest


def require_readable(data: bytes, where: object) -> None:
    """Checks of canonical bytes all that :func:`parse` does, and makes nothing of them: what a writer asks of its own manifest.

    Raises:
        FormatError: as :func:`parse`.
    """
    _current(_read(data, where), where)


def _read(data: bytes, where: object) -> dict[str, Any]:
    """The JSON value, which is a manifest that this version understands."""
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
    if _minor(value["format_version"]) >= _FIRST_SEALED:
        right, said = _integrity(data)
        if right != said or said != value.get("integrity"):
            raise FormatError("the manifest is not the one that was written: a byte of it was changed", where=f"{where}#/integrity",
                              expected=right, found=said[:64], remedy="fetch the pack again, or pack the adapter again")
    return value


def _current(value: dict[str, Any], where: object) -> dict[str, Any]:
    """The value as the current version has it, which fits the schema."""
    try:
        current = upgraded(value)
    except FormatError as error:
        raise FormatError(error.what, where=f"{where}#{error.where}", remedy=error.remedy) from error
    newer = _minor(current.get("format_version")) > _minor(FORMAT_VERSION)
    if newer:
        current = pruned(current, resources.schema("manifest.v1"))
    problem = schema_problem(current, "manifest.v1")
    if problem:
        pointer, message = problem
        raise FormatError(f"the manifest does not fit its schema: {message}", where=f"{where}#{pointer}",
                          remedy=f"it is of version {value['format_version']}: update adapterpack" if newer else None)
    _require_sizes(current, where)
    return current


def _require_sizes(value: Mapping[str, Any], where: object) -> None:
    """Goes on only if numbers that are bounded one by one are bounded together, too."""
    common = settings = _count(value["config"])
    for number, group in enumerate(value["groups"]):
        if (group["in_features"] or 1) * (group["out_features"] or 1) > LARGEST_WEIGHT:
            raise FormatError("a layer is larger than there are any", where=f"{where}#/groups/{number}",
                              expected=f"at most {LARGEST_WEIGHT} numbers", found=f"{group['out_features']} x {group['in_features']}")
        settings += _count(group["config"]) + (common if group["config"] and group["method"] is None else 0)
    if settings > MOST_SETTINGS:
        raise FormatError("the sites have too many hyper-parameters", where=f"{where}#/groups", found=settings,
                          expected=f"at most {MOST_SETTINGS} values")


def _count(value: Any) -> int:
    """The values in a JSON value."""
    if isinstance(value, dict):
        return sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, list) else 1


def _minor(version: Any) -> int:
    """The minor version, -1 for what is none."""
    minor = str(version).partition(".")[2]
    return int(minor) if len(minor) < 6 and minor.isdecimal() and minor.isascii() else -1


def _decode(value: dict[str, Any]) -> Manifest:
    lineage, labels, base = value["lineage"], value["task"]["labels"], value["base"]
    rare = {key: value[key] for key in ("tokenizer", "base_quantization", "canary", "composition")}
    if any(rare.values()):
        from .parts import decoded  # noqa: PLC0415 - most packs have none of them

        rare = decoded(rare)
    known = {f.name for f in dataclasses.fields(Manifest)}
    plain = {key: item for key, item in value.items() if key in known}
    return Manifest(
        **{
            **plain,
            "pack": PackInfo(**{**value["pack"], "authors": tuple(value["pack"]["authors"])}),
            "method": MethodRef(**value["method"]),
            "task": Task(**{**value["task"], "labels": None if labels is None else tuple(labels)}),
            "base": decode_base(base),
            "groups": tuple(Group(**{**group, "method": group["method"] and MethodRef(**group["method"])}) for group in value["groups"]),
            "tensors": {name: TensorEntry(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in value["tensors"].items()},
            "files": tuple(FileEntry(**entry) for entry in value["files"]),
            "lineage": lineage and Lineage(**{**lineage, "parents": tuple(Parent(**parent) for parent in lineage["parents"]),
                                              "ancestors": {one: tuple(before) for one, before in lineage["ancestors"].items()}}),
            **rare,
            "metrics": tuple(value["metrics"]),
            "must_understand": tuple(value["must_understand"]),
        }
    )


def decode_base(value: Mapping[str, Any]) -> Base:
    """The base that a manifest or a bundle names, from its JSON; fields that are left out are unknown."""
    dims, variants = value.get("dims"), value.get("variants", ())
    if not dims and not variants:
        return Base(**{**value, "dims": None, "variants": ()})
    from .parts import Dims, Variant  # noqa: PLC0415 - most packs name neither

    return Base(**{**value, "dims": dims and Dims(**dims), "variants": tuple(Variant(**one) for one in variants)})
