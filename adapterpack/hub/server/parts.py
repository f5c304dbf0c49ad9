"""Receives large files in parts, so that an interrupted upload can resume.

    tmp/parts/SHA256/NUMBER-ETAG      one part; ETAG is the sha256 of its bytes

A part is either complete or absent, and a client that sends the file again learns which parts have arrived.
When all have, they are joined to one blob, if its SHA-256 is the announced one.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from pathlib import Path

from ...errors import storage_errors
from ...http import bad_request
from ...io import own_folder
from .storage import HubStorage

PART = 64 << 20
_MOST = 1000
_NAME = re.compile(r"(\d{1,5})-([0-9a-f]{64})")
_CHUNK = 1 << 20


def part_size(size: int, part: int) -> int | None:
    """Returns the bytes of every part of a file but the last, which has the rest; None if the file is sent in
    one piece.

    Example:
        >>> part_size(100, part=40), part_size(40, part=40)
        (40, None)
    """
    return max(part, math.ceil(size / _MOST)) if size > part else None


class UploadedParts:
    """The parts of all files that are being uploaded to a storage."""

    def __init__(self, storage: HubStorage) -> None:
        self.storage = storage
        self.root = own_folder(storage.root / "tmp" / "parts")

    def remove_older(self, until: float) -> None:
        """Removes the parts of every file that has received no part since ``until``."""
        for folder in self.root.iterdir():
            if folder.lstat().st_mtime < until:
                shutil.rmtree(folder, ignore_errors=True)

    def list_received(self, sha256: str) -> dict[int, str]:
        """Returns the parts that have arrived: number -> SHA-256."""
        folder = self.root / sha256
        names = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
        return {int(match[1]): match[2] for match in names if match}

    def keep(self, sha256: str, number: int, source: Path, etag: str) -> None:
        """Takes over one part by a rename."""
        with storage_errors(self.root):
            (self.root / sha256).mkdir(exist_ok=True)
            place = self.root / sha256 / f"{number}-{etag}"
            source.replace(place)
            # an earlier upload of the same part with other bytes
            for other in self.root.joinpath(sha256).glob(f"{number}-*"):
                if other != place:
                    other.unlink(missing_ok=True)

    def join(self, sha256: str, size: int, etags: list[str]) -> None:
        """Joins the parts to one blob, hashing them on the way. The parts are removed, even if the hash is
        wrong.

        Raises:
            HTTPError: a part is missing, or the file is not the announced one.
        """
        paths = [self.root / sha256 / f"{number}-{etag}" for number, etag in enumerate(etags, 1)]
        if not all(path.is_file() for path in paths):
            raise bad_request("A part is missing: send the file again")
        hasher = hashlib.sha256()
        count = 0
        with storage_errors(self.root), self.storage.incoming() as whole:
            with whole.open("wb") as target:
                for path in paths:
                    with path.open("rb") as file:
                        while chunk := file.read(_CHUNK):
                            hasher.update(chunk)
                            target.write(chunk)
                            count += len(chunk)
            shutil.rmtree(self.root / sha256, ignore_errors=True)
            if count != size or hasher.hexdigest() != sha256:
                raise bad_request("These are not the announced bytes")
            self.storage.adopt(whole, sha256)
