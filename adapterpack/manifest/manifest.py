"""Defines :class:`Manifest`, the description of a pack, with its canonical bytes and its parser."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, field

from ..errors import FormatError
from ..io import Json, Misfit, StrictStruct, strict_json, typed_json
from ..tasks.data import MARKED, ONE
from . import structs
from .integrity import digests_in, require_whole, seal
from .migrations import refuse_layer_replication, upgrade
from .structs import (
    LARGEST_CLAIM,
    LARGEST_SETTING,
    OF_CLAIMS,
    Base,
    BaseQuantization,
    Canary,
    Claims,
    Composition,
    FileEntry,
    Group,
    Hex,
    Key,
    Lineage,
    MethodRef,
    Metric,
    Packed,
    PackFile,
    PackInfo,
    PackTask,
    PackTokenizer,
    Parent,
    Quantization,
    Safety,
    Settings,
    ShortText,
    TensorEntry,
    TrainingClaims,
    too_large,
)

__all__ = [
    "FEATURES",
    "FILE_NAME",
    "FORMAT_VERSION",
    "MAX_BYTES",
    "METHODS",
    "NAME",
    "Base",
    "FileEntry",
    "Group",
    "Lineage",
    "Manifest",
    "MethodRef",
    "PackFile",
    "PackInfo",
    "PackTask",
    "Parent",
    "TensorEntry",
    "parse",
    "seal",
]

FILE_NAME = "adapterpack.json"
FORMAT_VERSION = "1.4"
MAX_BYTES = 4 << 20
LARGEST_WEIGHT = 1 << 33
"""The most numbers in the weight of one layer: an output head of 16384 by half a million."""
MOST_SETTINGS = 1 << 20
"""The most hyper-parameter values of all sites together: every site with its own values also reads the common
ones again.
"""
NAME = re.compile(structs.NAME)


def plain_name(text: str, otherwise: str = "adapter") -> str:
    """Replaces the characters that a pack's name may not have; ``otherwise`` is the name if none is left.

    Example:
        >>> plain_name("my LoRA (v2)")
        'my-LoRA-v2'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:128] or otherwise


METHODS = "methods"
"""The feature of a pack in which some group has another method than the pack."""
PACKED = "packed"
"""The feature of a pack whose matrices are stored as codes, described by ``quantization.packed``; "int8" is
an older form, by rows.
"""
FEATURES = frozenset({"int8", PACKED, METHODS, "composition", *MARKED})
"""The ``must_understand`` entries that this reader supports."""
_FIRST_SEALED = 4
"""The first minor version whose manifests contain a digest of themselves."""


class Manifest(StrictStruct, dict=True):
    """The whole manifest. ``training``, ``metrics``, the licenses and what ``pack`` says are claimed, not
    verifiable.

    A manifest that was read keeps its bytes: they are its identity, whatever version of the format they are
    in.
    """

    pack: PackInfo
    method: MethodRef
    config: Settings
    task: PackTask
    base: Base
    groups: Annotated[tuple[Group, ...], Meta(min_length=1, max_length=50_000)]
    tensors: Annotated[Mapping[structs.Path, TensorEntry], Meta(min_length=1, max_length=50_000)]
    files: Annotated[tuple[PackFile, ...], Meta(min_length=1, max_length=64)]
    lineage: Lineage | None = None
    quantization: Quantization | None = None
    canary: Canary | None = None
    safety: Safety = field(default_factory=lambda: Safety(contains_code=False, requires_remote_code=False))
    training: Annotated[Mapping[Key, Any], Meta(max_length=256, extra_json_schema=OF_CLAIMS)] = field(
        default_factory=dict
    )
    metrics: Annotated[tuple[Claims, ...], Meta(max_length=256)] = ()
    license: ShortText | None = None
    must_understand: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_.-]{0,63}\Z")], ...],
        Meta(max_length=32, extra_json_schema={"uniqueItems": True}),
    ] = ()
    extensions: Annotated[
        Mapping[Annotated[str, Meta(pattern=r"^x_[a-z0-9_]{1,63}\Z")], Any],
        Meta(max_length=64, extra_json_schema=OF_CLAIMS),
    ] = field(default_factory=dict)
    format: Literal["adapterpack"] = "adapterpack"
    format_version: Annotated[str, Meta(pattern=r"^1\.[0-9]{1,4}\Z")] = FORMAT_VERSION
    tokenizer: PackTokenizer | None = None
    base_quantization: BaseQuantization | None = None
    base_license: ShortText | None = None
    license_link: Annotated[str, Meta(max_length=2000)] | None = None
    license_sha256: Hex | None = None
    composition: Composition | None = None

    # set on the instance by parse; no field, so that a changed copy does not inherit it
    _raw: ClassVar[bytes | None] = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields a broken safety promise, a value beyond its bounds, a claim of the wrong type, or a repeated
        feature.
        """
        yield from (
            Misfit(f"/safety/{key}", "is true: a pack brings no code")
            for key, broken in self.safety.items()
            if broken
        )
        yield from typed_json.find_duplicates(self.must_understand, "/must_understand")
        yield from too_large(self.config, "/config", LARGEST_SETTING)
        yield from too_large(self.extensions, "/extensions", LARGEST_CLAIM)
        metrics = ((f"/metrics/{number}", metric, Metric) for number, metric in enumerate(self.metrics))
        for pointer, claims, kind in [("/training", self.training, TrainingClaims), *metrics]:
            if problem := typed_json.misfit(claims, kind):
                yield Misfit(pointer + problem.pointer, problem.message)
            yield from too_large(claims, pointer, LARGEST_CLAIM)

    @cached_property
    def adapter_groups(self) -> tuple[Group, ...]:
        """The groups of the modules that an adapter changes."""
        return tuple(group for group in self.groups if group.role == "adapter")

    @cached_property
    def full_groups(self) -> tuple[Group, ...]:
        """The groups of the modules that were trained in full."""
        return tuple(group for group in self.groups if group.role == "full")

    @property
    def packed(self) -> Mapping[str, Packed]:
        """Tensor name -> how to read its bytes, for tensors stored as codes."""
        return {} if self.quantization is None else self.quantization.get("packed", {})

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the matrix that a tensor represents, however it is stored."""
        packed = self.packed.get(name)
        return tuple(self.tensors[name].shape if packed is None else packed.shape)

    @property
    def problem(self) -> str:
        """What the logits of the pack's head mean, as ``problem_type`` in transformers' configs."""
        return next((feature for feature in self.must_understand if feature in MARKED), ONE.name)

    def to_json(self) -> Json:
        """Returns the manifest as plain JSON values."""
        return {**strict_json.plain(self), "integrity": self.integrity}

    def to_bytes(self) -> bytes:
        """Returns the bytes that it was read from, or else its canonical bytes; their sha256 is the pack's
        id.
        """
        return self._raw if self._raw is not None else self._canonical

    @cached_property
    def _canonical(self) -> bytes:
        return seal(msgspec.structs.asdict(self))

    @cached_property
    def integrity(self) -> str:
        """The digest that the canonical bytes contain of themselves."""
        return digests_in(self._canonical)[1]

    @cached_property
    def id(self) -> str:
        """``sha256:`` followed by the digest of the manifest's bytes."""
        return f"sha256:{hashlib.sha256(self.to_bytes()).hexdigest()}"


def parse(data: bytes, where: object, value: Any = None) -> Manifest:
    """Parses the manifest in ``data`` and checks its limits and its own digest; ``value`` is the JSON in it,
    if already parsed.

    Raises:
        FormatError: the manifest is malformed or altered, has another major version, or needs a feature that
            this version does not support.
    """
    value = _require_known(strict_json.loads(data, where, MAX_BYTES) if value is None else value, data, where)
    if strict_json.canonical(value) != data:
        raise FormatError(
            "the manifest is not in its canonical form: it was edited by hand",
            where=where,
            remedy="pack the adapter again",
        )
    manifest = _convert(value, where)
    manifest.__dict__["_raw"] = data
    return manifest


def _require_known(value: Any, data: bytes, where: object) -> Json:
    """Returns the JSON value in ``data`` after checking that it is a manifest that this version understands
    and that its bytes are unchanged.
    """
    if not isinstance(value, dict) or value.get("format") != "adapterpack":
        raise FormatError("this is not an adapterpack manifest", where=where, expected="format: adapterpack")
    major = str(value.get("format_version", "")).partition(".")[0]
    if major != FORMAT_VERSION.partition(".")[0]:
        raise FormatError(
            "another major version of the format",
            where=where,
            expected="1.x",
            found=value.get("format_version"),
            remedy="use a version of adapterpack that reads it",
        )
    needs = value.get("must_understand")
    unknown = {str(feature) for feature in needs} - FEATURES if isinstance(needs, list) else set()
    if unknown:
        raise FormatError(
            "the pack needs features that this version does not have",
            where=where,
            expected=", ".join(sorted(FEATURES)),
            found=", ".join(sorted(unknown)),
            remedy="update adapterpack",
        )
    if _minor(value["format_version"]) >= _FIRST_SEALED:
        require_whole(value, data, where, "fetch the pack again, or pack the adapter again")
    return value


def _convert(value: Json, where: object) -> Manifest:
    """Converts a JSON value to a manifest of the current version."""
    config = value.get("config")
    refuse_layer_replication(config.get("repeated_layers") if isinstance(config, dict) else None, where)
    try:
        current = upgrade(value)
    except FormatError as error:
        raise FormatError(error.what, where=f"{where}#{error.where}", remedy=error.remedy) from error
    newer = _minor(current.get("format_version")) > _minor(FORMAT_VERSION)
    manifest = typed_json.require(
        {key: item for key, item in current.items() if key != "integrity"},
        Manifest,
        "the manifest does not fit its schema",
        where,
        newer=newer,
        remedy=f"it is of version {value['format_version']}: update adapterpack" if newer else None,
    )
    _require_sizes(manifest, where)
    return manifest


def _require_sizes(manifest: Manifest, where: object) -> None:
    """Checks that numbers that are each within bounds are also within bounds together."""
    common = settings = _count(manifest.config)
    for number, group in enumerate(manifest.groups):
        if (group.in_features or 1) * (group.out_features or 1) > LARGEST_WEIGHT:
            raise FormatError(
                "a layer is larger than there are any",
                where=f"{where}#/groups/{number}",
                expected=f"at most {LARGEST_WEIGHT} numbers",
                found=f"{group.out_features} x {group.in_features}",
            )
        settings += _count(group.config) + (common if group.config and group.method is None else 0)
    if settings > MOST_SETTINGS:
        raise FormatError(
            "the sites have too many hyper-parameters",
            where=f"{where}#/groups",
            found=settings,
            expected=f"at most {MOST_SETTINGS} values",
        )


def _count(value: Any) -> int:
    """Returns the number of leaf values in a JSON value."""
    if isinstance(value, dict):
        return sum(map(_count, value.values()))
    return sum(map(_count, value)) if isinstance(value, list) else 1


def _minor(version: Any) -> int:
    """Returns the minor version, or -1 for an invalid one."""
    minor = str(version).partition(".")[2]
    return int(minor) if len(minor) < 6 and minor.isdecimal() and minor.isascii() else -1
