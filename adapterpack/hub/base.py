"""Identifies a base model on a hub from its listing, the headers of its shards and its small files, without
reading any weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from ..base import INDEX, SINGLE, Checkpoint
from ..base import fingerprint as fp
from ..errors import FormatError, StorageError
from ..io import Json
from .artifact import require_at_most
from .transport import HeaderFile, ListedFile, Remote, connect, fetch, names, read_header, tree

_FIRST = 32 << 10
"""Bytes of the first range request. A shard's header has about 100 bytes for each tensor."""
_AT_ONCE = 8
_MAX_SHARDS = 1000
_MAX_HEADERS = 256 << 20
_MAX_SMALL = 4 << 20
_MAX_INDEX = 16 << 20
_MAX_HASHED = 1 << 20
_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")


class RemoteBase(Checkpoint):
    """A checkpoint on a hub: names, dtypes, shapes, and the SHA-256 digests that the hub lists.

    ``folder`` holds its index, its ``config.json`` and its templates; ``unread`` names files that were too
    large to fetch.

    Raises:
        FormatError: a header is malformed, the index does not match, or a file is too large for its kind.
        HubError: the hub refuses; the subclass says why.
        StorageError: the repository holds no safetensors checkpoint.
    """

    has_weights = False

    def __init__(self, remote: Remote, listed: dict[str, ListedFile], scratch: Path) -> None:
        self.remote = remote
        self.listed = listed
        self.unread = list[str]()
        for name, limit in (
            (INDEX, _MAX_INDEX),
            ("config.json", _MAX_SMALL),
            *((template, _MAX_SMALL) for template in _TEMPLATES),
        ):
            if name in listed and not (name == INDEX and SINGLE in listed):
                what = "a file of the base is too large to be what its name says"
                require_at_most(limit, listed[name].size, what, f"{remote}, {name}")
                fetch(remote, listed[name], scratch / name)
        super().__init__(scratch)

    def _shards(self) -> tuple[Json | None, list[str]]:
        if SINGLE in self.listed:
            return None, [SINGLE]
        if INDEX not in self.listed:
            raise StorageError(
                "the repository holds no safetensors checkpoint",
                where=self.remote,
                expected=f"{SINGLE} or {INDEX}",
                remedy="name a base with safetensors files; pickle files are refused",
            )
        index, shards = super()._shards()
        if len(shards) > _MAX_SHARDS or any(shard not in self.listed for shard in shards):
            raise FormatError(
                "the index names shards that are not there, or too many",
                where=f"{self.remote}, {INDEX}",
                expected=f"at most {_MAX_SHARDS}, each in the listing",
                found=len(shards),
            )
        return index, shards

    def _opened(self, shards: Iterable[str]) -> dict[str, HeaderFile]:  # type: ignore[override]
        """Reads the headers, with several requests at once."""

        def header(shard: str) -> HeaderFile:
            return read_header(self.remote, shard, self.listed[shard].size, _FIRST)

        self.identities = {}  # no local file is hashed here
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            files = dict(zip(shards, pool.map(header, shards), strict=True))
        size = sum(len(file.head) for file in files.values())
        require_at_most(_MAX_HEADERS, size, "the headers of the base are too large", self.remote)
        return files

    @property
    def where(self) -> str:
        """The repository and its commit."""
        return str(self.remote)

    @cached_property
    def name(self) -> str:
        """The name of the repository."""
        return self.remote.repo

    @cached_property
    def commit(self) -> str | None:
        """The commit that was read."""
        return self.remote.commit

    def fingerprint(self, *, content: bool = True, files: bool = False) -> fp.Fingerprint:
        """Returns ``structure`` and, if the hub lists every digest, ``files``. The other fingerprints need
        the weights.
        """
        entries = self._entries()
        return fp.Fingerprint(self.structure, None, None if entries is None else fp.files(entries), None)

    def _entries(self) -> list[fp.HashedFile] | None:
        whole = {shard: self.listed[shard].sha256 for shard in self.files}
        if self.index is not None:
            whole[INDEX] = hashlib.sha256((self.folder / INDEX).read_bytes()).hexdigest()
        if None in whole.values():
            return None
        return [
            fp.HashedFile(name, self.listed[name].size, str(sha256)) for name, sha256 in sorted(whole.items())
        ]

    def has_file(self, name: str, sha256: str) -> bool | None:
        """Returns whether a file has this SHA-256, or None if the hub does not list it and the file is too
        large to fetch.
        """
        file = self.listed.get(name)
        if file is None or file.sha256 is not None:
            return file is not None and file.sha256 == sha256
        if file.size > _MAX_HASHED:
            self.unread.append(name)
            return None
        if not (self.folder / name).is_file():
            fetch(self.remote, file, self.folder / name)
        return super().has_file(name, sha256)


def remote_base(reference: names.HubReference, scratch: Path, token: str | None) -> RemoteBase:
    """Opens the base that a reference names. The few files that it fetches go to ``scratch``, which must be
    empty.

    Raises:
        FormatError, HubError, StorageError: see :class:`RemoteBase`.
    """
    remote = connect(reference, token)
    return RemoteBase(remote, tree(remote), scratch)
