"""Checks that PEFT's files agree with the manifest, and reports unknown options of PEFT folders.
AP601-AP604.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import safetensors

from ....io import TENSORS
from ....peft import layout, unknown_sentence
from ... import METADATA, TEMPLATE
from ...pack import FILE_ROLES
from .context import Subject
from .finding import Finding, check_rule

FACE = check_rule("AP601")
LIST = check_rule("AP602")
READERS = check_rule("AP603")
OPTION = check_rule("AP604")

_SECOND = "the second reader"


def peft_face(s: Subject) -> Iterator[Finding]:
    """AP601-AP602: PEFT would read what the manifest says.

    The check compares meanings and not bytes, because another version of adapterpack may write PEFT's config
    differently.
    """
    # never for quantized tensors, whose codes PEFT would use as values
    has_face = layout.config_bytes(s.manifest) is not None
    listed = sorted((entry.path, entry.role) for entry in s.manifest.files)
    optional = [TEMPLATE] if TEMPLATE in s.file_bytes else []
    expected = sorted(
        (name, FILE_ROLES[name]) for name in (TENSORS, *([layout.CONFIG] if has_face else []), *optional)
    )
    if listed != expected:
        yield LIST.at("files", f"the file list is {listed}, this pack's must be {expected}", pointer="/files")
        return
    if s.file.metadata != METADATA:
        yield FACE.at(TENSORS, f"the file's metadata must be {METADATA}", file=TENSORS, offset=8)
    if not has_face:
        return
    with s.file.watched(lambda: s.budget.require_time("what PEFT would read")):
        problem = layout.disagreement(s.folder, s.manifest, s.file_bytes[layout.CONFIG], s.file)
    if problem:
        yield FACE.at(
            layout.CONFIG, f"the file does not agree with the manifest: {problem}", file=layout.CONFIG
        )


def options(unknown: Mapping[str, Any]) -> Iterator[Finding]:
    """AP604, for the unknown options that the import returned."""
    if unknown:
        pointer = f"/{next(iter(unknown))}"
        yield OPTION.at(layout.CONFIG, unknown_sentence(unknown), file=layout.CONFIG, pointer=pointer)


def second_reader(s: Subject) -> Iterator[Finding]:
    """AP603: safetensors' own reader reads the same tensors; only in a full validation."""
    if not s.full:
        return
    # the reader needs the file as bytes and copies every tensor
    s.require_memory(2 * len(s.file_bytes[TENSORS]), _SECOND)
    try:
        theirs = dict(safetensors.deserialize(bytes(s.file_bytes[TENSORS])))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        yield READERS.at(TENSORS, f"the reference reader refuses the file: {error}", file=TENSORS)
        return
    if theirs.keys() != s.file.tensors.keys() or not all(_agrees(s, name, theirs[name]) for name in theirs):
        yield READERS.at(TENSORS, "the reference reader reads other tensors from the file", file=TENSORS)


def _agrees(s: Subject, name: str, theirs: Mapping[str, Any]) -> bool:
    """Whether the reference reader returns the same dtype, shape and bytes of a tensor as this package's
    reader.
    """
    s.budget.require_time(_SECOND)
    info = s.file.tensors[name]
    return (theirs["dtype"], tuple(theirs["shape"])) == (info.dtype, info.shape) and bool(
        theirs["data"] == s.file.buffer(name)
    )
