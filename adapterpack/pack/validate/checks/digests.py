"""Compares the bytes of tensors and files with the digests in the manifest. AP104, AP105, AP204."""

from __future__ import annotations

from collections.abc import Iterator

from ....io import hashing
from ....io.safe_open import TENSORS
from . import folder, tensors
from .context import Subject
from .finding import Finding


def digests(s: Subject) -> Iterator[Finding]:
    """AP204, and AP104 and AP105 if no tensor was altered: altered bytes are reported for the tensor that
    they belong to.

    Tensors and the file that contains them are hashed at the same time, because the hash of one file cannot
    be parallelised: together they take no longer than the file alone.
    """
    entries, files = sorted(s.pack.manifest.tensors.items()), s.pack.manifest.files
    sources: dict[tuple[str, str], hashing.Parts] = {
        ("tensor", name): [s.file.buffer(name)] for name, _ in entries
    }
    sources |= {("file", entry.path): [s.file_bytes[entry.path]] for entry in files}
    hashes = hashing.digests(
        sources, watch=lambda: s.budget.require_time("the digests of the files and tensors")
    )
    altered = [name for name, entry in entries if hashes["tensor", name].hex() != entry.sha256]
    for name in altered:
        yield tensors.DIGEST.at(
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
