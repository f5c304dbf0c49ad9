"""Inputs that guided fuzzing kept: an archive for each target, since one input is much like the next."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path


def archive_of(corpus: Path, target: str) -> Path:
    """Where the inputs of a target are."""
    return corpus / f"{target}.tar.xz"


def inputs(archive: Path) -> Iterator[bytes]:
    """The inputs in an archive; none if it is not there."""
    if archive.is_file():
        with tarfile.open(archive) as opened:
            for member in opened:
                yield opened.extractfile(member).read()  # type: ignore[union-attr]


def keep(found: Iterable[bytes], archive: Path) -> None:
    """Writes the archive, the same bytes for the same inputs."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as opened:
        for number, data in enumerate(sorted(found)):
            member = tarfile.TarInfo(str(number))
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
