"""Keeps a hub on disk: blobs by sha256, commits that never change, refs that move by a rename under a lock.

blobs/ab/abcd...                      files by sha256
repos/ORG/NAME/repo.json              visibility, gate; its presence is the repository's
repos/ORG/NAME/commits/OID.json       parent, message and the pages of the tree, which are blobs; OID is the
sha1 of those bytes repos/ORG/NAME/refs/KIND/NAME         a commit; slashes of a ref's name are written as %2F
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import msgspec

from ...base import is_repo
from ...errors import OutputExists, StorageError, storage_errors
from ...http import HTTPError, bad_request
from ...io import FrozenStruct, blobs, hold_lock, output_file, output_folder, own_folder, strict_json
from ...paths import StrPath
from ..transport import names
from .trees import MAX_FILES, Entry, Page, Tree

KINDS = ("heads", "tags", "pr")
MAX_REFS = 1000
SPARE = 64 << 20
"""Bytes of disk space that the hub leaves free."""


@dataclass(frozen=True)
class Commit:
    """One state of a repository. ``time`` is RFC 3339."""

    parent: str | None
    summary: str
    description: str
    author: str
    time: str
    files: Tree = field(default_factory=lambda: Tree.of({}))

    def to_bytes(self) -> bytes:
        """Returns the bytes of which its id is the SHA-1."""
        return strict_json.canonical(
            {key: value for key, value in vars(self).items() if key != "files"} | {"pages": self.files.pages}
        )

    @property
    def oid(self) -> str:
        """Its id, 40 hex digits."""
        return hashlib.sha1(self.to_bytes(), usedforsecurity=False).hexdigest()


class Settings(FrozenStruct):
    """The visibility of a repository, and when it was ``created``.

    ``private``: only holders of a token see it. ``gated`` ("auto", "manual" or False): everyone sees it, but
    only ``granted`` users and writers can read its files.
    """

    private: bool
    created: str = ""
    gated: str | bool = False
    granted: tuple[str, ...] = ()


class HubStorage:
    """The repositories in one folder, which several processes may serve.

    Example:
        >>> storage = HubStorage(tempfile.mkdtemp())
        >>> storage.create("org/name", private=False, author="me")
        >>> len(storage.resolve("org/name", "main"))
        40
    """

    def __init__(self, root: StrPath) -> None:
        self.root = Path(root)
        for name in ("blobs", "repos", "tmp"):
            own_folder(self.root / name)

    def folder(self, repo: str) -> Path:
        """Returns the folder of a repository.

        Raises:
            HTTPError: the repository does not exist.
        """
        if not is_repo(repo) or not (self.root / "repos" / repo / "repo.json").is_file():
            raise HTTPError(404, "RepoNotFound", "Repository not found")
        return self.root / "repos" / repo

    def repos(self) -> tuple[str, ...]:
        """Returns all repositories, sorted."""
        repos = (
            path.parent.relative_to(self.root / "repos").as_posix()
            for path in self.root.glob("repos/*/*/repo.json")
        )
        return tuple(sorted(repo for repo in repos if is_repo(repo)))

    def create(self, repo: str, *, private: bool, author: str) -> None:
        """Creates a repository with one empty commit.

        Raises:
            HTTPError: the name is taken or invalid.
        """
        if not is_repo(repo) or names.unsafe(repo):
            raise bad_request("A repository is OWNER/NAME, and neither is a device on any system")
        first = Commit(None, "initial commit", "", author, _now())
        try:
            with output_folder(self.root / "repos" / repo) as folder:
                for name in ("commits", *(f"refs/{kind}" for kind in KINDS)):
                    (folder / name).mkdir(parents=True)
                (folder / "commits" / f"{first.oid}.json").write_bytes(first.to_bytes())
                (folder / "refs" / "heads" / names.MAIN).write_text(first.oid, "ascii")
                (folder / "repo.json").write_bytes(strict_json.canonical(Settings(private, first.time)))
        except (OutputExists, StorageError) as error:  # taken before, or by another process during the rename
            if (self.root / "repos" / repo / "repo.json").is_file():
                raise HTTPError(409, "Conflict", "You already created this model repo") from error
            raise

    def settings(self, repo: str) -> Settings:
        """Returns the visibility of a repository."""
        path = self.folder(repo) / "repo.json"
        return msgspec.convert(_load(path.read_bytes(), path), Settings)

    def set(self, repo: str, change: Callable[[Settings], Settings]) -> None:
        """Changes the settings of a repository."""
        folder = self.folder(repo)
        with hold_lock(folder / ".lock", alone=True):
            settings = change(self.settings(repo))
            with output_file(folder / "repo.json") as path:
                path.write_bytes(strict_json.canonical(settings))

    def refs(self, repo: str, kind: str) -> dict[str, str]:
        """Returns the refs of one kind: name -> commit."""
        commits = {}
        for path in (self.folder(repo) / "refs" / kind).iterdir():
            if not path.name.startswith("."):
                with suppress(FileNotFoundError):  # removed meanwhile
                    commits[unquote(path.name)] = path.read_text("ascii")
        return dict(sorted(commits.items()))

    def resolve(self, repo: str, revision: str) -> str:
        """Returns the commit of a branch, a tag, a pull request's ref or a commit.

        Raises:
            HTTPError: there is no such revision.
        """
        folder = self.folder(repo)
        if names.COMMIT.fullmatch(revision) and (folder / "commits" / f"{revision}.json").is_file():
            return revision
        for kind, name in _refs_of(revision) if names.is_revision(revision) else ():
            with suppress(FileNotFoundError):
                return (folder / "refs" / kind / quote(name, safe="")).read_text("ascii")
        raise HTTPError(404, "RevisionNotFound", f"Invalid rev id: {revision[:80]}")

    def commit(self, repo: str, oid: str) -> Commit:
        """Reads a commit by its id, and checks that its bytes have that id.

        Raises:
            HTTPError: there is no such commit.
        """
        path = self.folder(repo) / "commits" / f"{oid}.json"
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise HTTPError(404, "RevisionNotFound", f"Invalid rev id: {oid}") from error
        if hashlib.sha1(data, usedforsecurity=False).hexdigest() != oid:
            raise StorageError(
                "a commit was altered on the hub's disk", where=path, remedy="restore it from a copy"
            )
        value = _load(data, path)
        if "files" in value:  # the format before pages
            files = Tree.of({name: Entry(**entry) for name, entry in value.pop("files").items()})
        else:
            files = Tree([Page(**page) for page in value.pop("pages")], self.bytes_of)
        return Commit(**value, files=files)

    def change(
        self,
        repo: str,
        revision: str,
        author: str,
        summary: str,
        description: str,
        *,
        parent: str | None,
        change: Callable[[dict[str, Entry]], None],
        as_pr: bool,
    ) -> tuple[str, int | None]:
        """Makes one commit on a branch, or with ``as_pr`` on a new pull request's ref. Returns the commit and
        the request's number.

        Raises:
            HTTPError: ``parent`` is no longer the head, or the revision is no branch.
        """
        folder = self.folder(repo)
        with hold_lock(folder / ".lock", alone=True):
            head = self.resolve(repo, revision)
            if parent is not None and parent != head:
                raise HTTPError(
                    412, "PreconditionFailed", "A commit has happened since. Please refresh and try again."
                )
            before = self.commit(repo, head)
            files = dict(before.files)
            change(files)
            if len(files) > MAX_FILES:
                raise HTTPError(413, "TooLarge", f"A repository has at most {MAX_FILES} files")
            tree = before.files.with_files(files, self._keep)
            if not as_pr and tree.pages == before.files.pages:
                return head, None
            made = Commit(head, summary[:500], description[:10_000], author, _now(), tree)
            with output_file(folder / "commits" / f"{made.oid}.json") as path:
                path.write_bytes(made.to_bytes())
            number = len(self.refs(repo, "pr")) + 1 if as_pr else None
            kind, name = ("pr", str(number)) if as_pr else _refs_of(revision)[0]
            if not as_pr and name not in self.refs(repo, kind):
                raise bad_request("Commits go to a branch")
            self._point(folder, kind, name, made.oid)
        return made.oid, number

    def add_ref(self, repo: str, kind: str, name: str, revision: str) -> None:
        """Creates a branch or tag.

        Raises:
            HTTPError: the name is taken or invalid.
        """
        if (
            not names.is_revision(name)
            or names.unsafe(name)
            or names.COMMIT.fullmatch(name)
            or name.startswith("refs/")
        ):
            raise bad_request("Not the name of a ref")
        folder = self.folder(repo)
        with hold_lock(folder / ".lock", alone=True):
            if (count := len(there := self.refs(repo, kind))) >= MAX_REFS:
                raise HTTPError(
                    413,
                    "TooLarge",
                    f"A repository has at most {MAX_REFS} references of a kind, and this one has {count}",
                )
            if name in there:
                raise HTTPError(409, "Conflict", "Reference already exists")
            self._point(folder, kind, name, self.resolve(repo, revision))

    def drop_tag(self, repo: str, name: str) -> None:
        """Removes a tag; commits stay."""
        folder = self.folder(repo)
        with hold_lock(folder / ".lock", alone=True):
            if name not in self.refs(repo, "tags"):
                raise HTTPError(404, "RevisionNotFound", "No such reference")
            (folder / "refs" / "tags" / quote(name, safe="")).unlink()

    @staticmethod
    def _point(folder: Path, kind: str, name: str, oid: str) -> None:
        with output_file(folder / "refs" / kind / quote(name, safe="")) as path:
            path.write_text(oid, "ascii")

    def blob(self, sha256: str) -> Path:
        """Returns the path for the blob with this SHA-256, whether or not it exists."""
        return blobs.place(self.root / "blobs", sha256)

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """Yields an empty file for incoming bytes; it is removed afterwards unless it was adopted."""
        descriptor, name = tempfile.mkstemp(dir=self.root / "tmp")
        os.close(descriptor)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def adopt(self, path: Path, sha256: str) -> None:
        """Makes an :meth:`incoming` file the blob of that SHA-256, with which it was hashed on arrival."""
        blobs.adopt(self.root / "blobs", path, sha256)
        if not self.renew(sha256):  # it existed, and was collected at this very moment
            blobs.adopt(self.root / "blobs", path, sha256)

    def renew(self, sha256: str) -> bool:
        """Returns whether the blob exists; if so, keeps it for another day, in which a commit can name it."""
        try:
            os.utime(self.blob(sha256))
        except FileNotFoundError:
            return False
        return True

    def keep_bytes(self, data: bytes) -> Entry:
        """Stores a small file as a blob and returns its entry."""
        return Entry(len(data), self._keep(data), git_oid(data), False)

    def _keep(self, data: bytes) -> str:
        """Stores bytes as a blob and returns their SHA-256."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.renew(sha256):
            if len(data) + SPARE > self.free():
                raise HTTPError(507, "NoSpace", "The hub's disk is full")
            with self.incoming() as path:
                path.write_bytes(data)
                self.adopt(path, sha256)
        return sha256

    def bytes_of(self, sha256: str) -> bytes:
        """Reads the bytes of a page, and checks their SHA-256."""
        path = self.blob(sha256)
        with storage_errors(path):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(
                "a list of files was altered on the hub's disk", where=path, remedy="restore it from a copy"
            )
        return data

    def large(self, sha256: str) -> Entry:
        """Returns the entry of a large file that was uploaded before.

        Raises:
            HTTPError: the file was never uploaded.
        """
        if not self.renew(sha256):
            raise bad_request(f"The object {sha256} was not uploaded")
        size = self.blob(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Entry(size, sha256, git_oid(pointer), True)

    def free(self) -> int:
        """Returns the bytes of free disk space."""
        return shutil.disk_usage(self.root).free


def git_oid(data: bytes) -> str:
    """Returns git's blob id of a file, as hex; hubs list small files by it.

    Example:
        >>> git_oid(b"")
        'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
    """
    return hashlib.sha1(b"blob %d\x00%b" % (len(data), data), usedforsecurity=False).hexdigest()


def _refs_of(revision: str) -> list[tuple[str, str]]:
    """Returns the kinds and names of refs that a revision can mean, a branch before a tag."""
    if revision.startswith("refs/pr/"):
        return [("pr", revision.removeprefix("refs/pr/"))]
    return [("heads", revision), ("tags", revision)]


def _load(data: bytes, path: Path) -> Any:
    return strict_json.loads(data, path, 64 << 20)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
