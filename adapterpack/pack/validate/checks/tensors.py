"""Checks that the manifest's index matches the tensor file, and that quantized tensors can be decoded.
AP201-AP207.
"""

from __future__ import annotations

from collections.abc import Iterator

from ....io import TENSORS, hashing
from ....manifest import PACKED
from ...quantized_tensors import overflows, problem
from . import folder
from .context import Subject, tensor_pointer
from .finding import Finding, check_rule
from .values import NONFINITE

MISSING = check_rule("AP201")
UNLISTED = check_rule("AP202")
SHAPE = check_rule("AP203")
DIGEST = check_rule("AP204")
SCALES = check_rule("AP205")
STRAY_SCALES = check_rule("AP206")
QUANTIZED = check_rule("AP207")


def tensor_index(s: Subject) -> Iterator[Finding]:
    """AP201-AP203, which only need the headers."""
    entries, stored = s.manifest.tensors, s.file.tensors
    for name in sorted(entries.keys() - stored.keys()):
        yield MISSING.at(
            name, "a tensor that the manifest lists is missing", file=TENSORS, pointer=tensor_pointer(name)
        )
    for name in sorted(stored.keys() - entries.keys()):
        yield UNLISTED.at(
            name, "a tensor that the manifest does not list", file=TENSORS, offset=stored[name].offset
        )
    for name in s.budget.over(sorted(entries.keys() & stored.keys()), "the index of the tensors"):
        entry, info = entries[name], stored[name]
        if (entry.dtype, entry.shape) != (info.dtype, info.shape):
            yield SHAPE.at(
                name,
                f"the tensor is {info.dtype} {list(info.shape)}, the manifest says {entry.dtype} "
                f"{list(entry.shape)}",
                file=TENSORS,
                pointer=tensor_pointer(name),
            )


def _packed(s: Subject) -> Iterator[Finding]:
    entries = s.manifest.tensors
    for name, packed in s.budget.over(s.manifest.packed.items(), "the codes of the tensors"):
        entry = entries.get(name)
        if entry is None or entry.scales is not None:
            wrong: str | None = "it is not there, or stored in another way, too"
        else:
            wrong = problem(packed, s.file.read(name), entry.dtype, entry.shape)
        if wrong is not None:
            yield SCALES.at(
                name, f"the tensor cannot be read: {wrong}", file=TENSORS, pointer=tensor_pointer(name)
            )


def quantized(s: Subject) -> Iterator[Finding]:
    """AP205-AP207: quantized tensors can be decoded, and the manifest declares them."""
    entries = s.manifest.tensors
    used = set()
    for name, entry in s.budget.over(entries.items(), "the scales of the tensors"):
        if entry.scales is None:
            if entry.dtype == "I8":
                yield SCALES.at(
                    name, "an int8 tensor without scales", file=TENSORS, pointer=tensor_pointer(name)
                )
            continue
        used.add(entry.scales)
        scales = entries.get(entry.scales)
        wanted = (
            "F32",
            (*entry.shape[:1], *(1 for _ in entry.shape[1:])),
            entry.group,
            f"{entry.param}.scales",
        )
        if (
            entry.dtype != "I8"
            or scales is None
            or (scales.dtype, scales.shape, scales.group, scales.param) != wanted
        ):
            yield SCALES.at(
                name,
                "the tensor and its scales do not fit each other",
                file=TENSORS,
                pointer=tensor_pointer(name),
            )
        elif overflows(s.file.read(entry.scales)):
            yield NONFINITE.at(
                entry.scales,
                "a scale that is no number, or so large that values overflow",
                fix="quantize the pack again",
                file=TENSORS,
                offset=s.file.tensors[entry.scales].offset,
            )
    for name in sorted(
        name for name, entry in entries.items() if entry.param.endswith(".scales") and name not in used
    ):
        yield STRAY_SCALES.at(
            name, "scales that belong to no int8 tensor", file=TENSORS, pointer=tensor_pointer(name)
        )
    yield from _packed(s)
    manifest = s.manifest
    said = (
        manifest.quantization is not None,
        "int8" in manifest.must_understand,
        PACKED in manifest.must_understand,
    )
    if said != (bool(used or manifest.packed), bool(used), bool(manifest.packed)):
        yield QUANTIZED.at(
            "quantization",
            "the manifest does not say rightly whether the pack is quantized",
            pointer="/quantization",
        )


def digests(s: Subject) -> Iterator[Finding]:
    """AP204, and AP104 and AP105 if no tensor was altered: altered bytes are reported for the tensor that
    they belong to.

    Tensors and the file that contains them are hashed at the same time, because the hash of one file cannot
    be parallelised: together they take no longer than the file alone.
    """
    entries = sorted(s.manifest.tensors.items())
    files = s.manifest.files
    sources: dict[tuple[str, str], hashing.Parts] = {
        ("tensor", name): [s.file.buffer(name)] for name, _ in entries
    }
    sources |= {("file", entry.path): [s.file_bytes[entry.path]] for entry in files}
    hashes = hashing.digests(
        sources, watch=lambda: s.budget.require_time("the digests of the files and tensors")
    )
    altered = [name for name, entry in entries if hashes["tensor", name].hex() != entry.sha256]
    for name in altered:
        yield DIGEST.at(
            name,
            "the tensor's sha256 is not the manifest's: its bytes were altered",
            file=TENSORS,
            offset=s.file.tensors[name].offset,
        )
    for entry in files if not altered else ():
        if len(s.file_bytes[entry.path]) != entry.size:
            yield folder.SIZE.at(
                entry.path,
                f"the file does not have the {entry.size} bytes that the manifest says",
                file=entry.path,
            )
        elif hashes["file", entry.path].hex() != entry.sha256:
            yield folder.DIGEST.at(
                entry.path, "the file's sha256 is not the manifest's: it was altered", file=entry.path
            )
