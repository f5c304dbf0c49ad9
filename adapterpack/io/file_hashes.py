"""Caches the sha256 of files: a file whose device, inode, size and times are unchanged is not read again.

The hashes live as long as the process; those of large files are also stored in the user's cache folder, one
small file each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import StorageError
from .atomic import output_file
from .hashing import HashedSource, Identity, digests, identity
from .working_folders import cache_folder

LARGE = 64 << 20
"""Bytes from which a hash is cached on disk: smaller files take less than a tenth of a second to hash."""
_HASHES: dict[Identity, str] = {}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def file_hashes(
    files: Mapping[str, Path], *, again: bool = False, watch: Callable[[], None] | None = None
) -> dict[str, str]:
    """Returns the sha256 (hex) of each file, by name; cached ones unless ``again``.

    ``watch`` is called at every block; an exception from it ends the hashing. A hash is cached only if the
    file's last change is old enough that another change would show in its times.

    Raises:
        StorageError: a file is missing, cannot be read, or changed while it was hashed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "empty"
        >>> path.touch()
        >>> file_hashes({"empty": path})["empty"][:8]
        'e3b0c442'
    """
    seen = {name: identity(path) for name, path in files.items()}
    found = {} if again else {name: known for name, one in seen.items() if (known := _kept(one)) is not None}
    fresh = digests(
        {name: HashedSource.whole(files[name], one) for name, one in seen.items() if name not in found},
        watch=watch,
    )
    for name, sha256 in fresh.items():
        found[name] = sha256.hex()
        if seen[name].settled and identity(files[name]) == seen[name]:
            _keep(seen[name], found[name])
    return found


def _kept(file: Identity) -> str | None:
    """Returns the cached hash of a file, or None."""
    if file not in _HASHES and file.size >= LARGE:
        with suppress(OSError, UnicodeDecodeError):
            *times, sha256 = _record(file).read_text("ascii").split()
            if times == _times(file) and _SHA256.fullmatch(sha256):
                _HASHES[file] = sha256
    return _HASHES.get(file)


def _keep(file: Identity, sha256: str) -> None:
    """Caches the hash of a file."""
    _HASHES[file] = sha256
    if file.size >= LARGE:
        # a cache that cannot be written is no reason to fail
        with suppress(StorageError), output_file(_record(file)) as record:
            record.write_text(" ".join([*_times(file), sha256]), "ascii")


def _record(file: Identity) -> Path:
    """Returns the path of a large file's cached hash; named by inode, so that a later file with that inode
    replaces it.
    """
    return cache_folder() / "hashes" / f"{file.device:x}-{file.inode:x}"


def _times(file: Identity) -> list[str]:
    """Returns the size and times that must be unchanged."""
    return [str(number) for number in (file.size, file.modified, file.changed)]
