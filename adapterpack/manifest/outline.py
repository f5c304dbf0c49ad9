"""The outline of a pack: what its manifest says at its top level, read without the entries of its tensors, so
that a list of a thousand packs takes less than a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ..io import FrozenStruct, strict_json
from .integrity import digests_in
from .manifest import FEATURES, FORMAT_VERSION, MAX_BYTES
from .structs import Base, Hex, MethodRef, PackFile, PackInfo, PackTask, Path


class OutlinedGroup(FrozenStruct, gc=False):
    """What an outline tells of a group."""

    path: Path
    role: str
    rank: int | None
    method: MethodRef | None


class Outline(FrozenStruct):
    """Some fields of :class:`~.manifest.Manifest`, with the same names and types."""

    pack: PackInfo
    method: MethodRef
    task: PackTask
    base: Base
    groups: tuple[OutlinedGroup, ...]
    files: tuple[PackFile, ...]
    extensions: Mapping[str, Any]
    must_understand: frozenset[str]
    format: Literal["adapterpack"]
    format_version: str
    integrity: Hex


_DECODER = msgspec.json.Decoder(Outline)


def outline_of(data: bytes) -> Outline | None:
    """Returns the outline of the manifest in ``data``, which has the digest that it contains of itself; None
    if :func:`~.manifest.parse` has to say what is wrong, or to upgrade another version.

    Raises:
        FormatError: the manifest has too many parts.
    """
    strict_json.require_few_parts(data, None, MAX_BYTES)
    try:
        outline = _DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return None
    known = outline.format_version == FORMAT_VERSION and outline.must_understand <= FEATURES
    return outline if known and digests_in(data)[0] == outline.integrity else None
