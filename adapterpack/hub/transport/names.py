"""Checks untrusted names: repositories, folders in them, revisions, and paths inside of a repository."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from ...base import is_repo
from ...errors import ConfigError, FormatError

SCHEME = "hf://"
COMMIT = re.compile(r"[0-9a-f]{40}")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,4}")
_LONGEST_REVISION = 200
"""The most characters of a revision: with its slashes as %2F it must still fit a file name."""
_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{name}{number}" for name in ("com", "lpt") for number in range(1, 10))}
)
MAIN = "main"


class HubReference(NamedTuple):
    """A repository, a revision of it (a branch, a tag, a pull request's ref or a commit), and a folder in it
    ("" for all).
    """

    repo: str
    revision: str = MAIN
    folder: str = ""

    @property
    def address(self) -> str:
        """OWNER/NAME, with the folder."""
        return f"{self.repo}/{self.folder}" if self.folder else self.repo

    @property
    def name(self) -> str:
        """The name for a local folder with these contents."""
        return self.address.rpartition("/")[2]

    @property
    def prefix(self) -> str:
        """The prefix of paths in the folder."""
        return f"{self.folder}/" if self.folder else ""

    def at(self, revision: str) -> HubReference:
        """Returns the reference with another revision."""
        return self._replace(revision=revision)

    def __str__(self) -> str:
        return f"{SCHEME}{self.address}@{self.revision}"


def is_revision(text: str) -> bool:
    """Returns whether a text can be the name of a branch or tag, or a commit.

    Example:
        >>> is_revision("v1.0"), is_revision("refs/pr/1"), is_revision("a..b")
        (True, True, False)
    """
    plain = _REVISION.fullmatch(text) is not None and ".." not in text
    return plain and len(text) <= _LONGEST_REVISION and not text.endswith((".lock", "."))


def is_folder(text: str) -> bool:
    """Returns whether a text can be a folder of a repository in a reference: plain path segments.

    Example:
        >>> is_folder("adapters/tickets"), is_folder("a/../b"), is_folder("a//b")
        (True, False, False)
    """
    return all(_SEGMENT.fullmatch(part) for part in text.split("/")) and unsafe(text) is None


def parse(text: str) -> HubReference:
    """Parses ``hf://org/name/folder@revision`` or ``org/name``.

    Raises:
        ConfigError: the text has neither form.

    Example:
        >>> parse("hf://org/name/adapters/tickets@v1")
        HubReference(repo='org/name', revision='v1', folder='adapters/tickets')
    """
    address, at, revision = text.removeprefix(SCHEME).partition("@")
    owner, _, rest = address.partition("/")
    name, slash, folder = rest.partition("/")
    if (
        not is_repo(f"{owner}/{name}")
        or (slash and not is_folder(folder))
        or (at and not is_revision(revision))
    ):
        raise ConfigError(
            "this is not the address of a repository on a hub",
            where=text,
            expected="hf://org/name or hf://org/name/folder, with or without @revision",
        )
    return HubReference(f"{owner}/{name}", revision or MAIN, folder)


def unsafe(path: str) -> str | None:
    """Returns why a path of a listing must not become a local file, or None if it may.

    Example:
        >>> unsafe("adapters/a/adapterpack.json"), unsafe("../x")
        (None, "a part that is '..'")
    """
    if not path or len(path.encode("utf-8", "surrogatepass")) > 255:
        return "it is empty or longer than 255 bytes"
    if (
        any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in path)
        or unicodedata.normalize("NFC", path) != path
    ):
        return "characters that not every file system keeps"
    if "\\" in path or ":" in path:
        return "a backslash or a colon"
    for part in path.split("/"):
        if part in {"", ".", ".."}:
            return f"a part that is {part!r}"
        if part.endswith((".", " ")) or part.partition(".")[0].casefold() in _DEVICES:
            return f"a part that some system takes for something else: {part!r}"
    return None


def require_safe(paths: list[str], where: object) -> None:
    """Checks every path of a listing, and that no two become one file on a case-insensitive file system.

    Raises:
        FormatError: a path leads out of its folder, or is not valid on every system.
    """
    for path in paths:
        if reason := unsafe(path):
            raise FormatError(
                "the hub lists a path that must not become a file here",
                where=where,
                found=f"{path[:80]!r}: {reason}",
                remedy="do not use this repository",
            )
    if both := clash(paths):
        raise FormatError(
            "the hub lists two paths that are one file on some systems",
            where=where,
            found=f"{both[0][:80]!r} and {both[1][:80]!r}",
            remedy="rename one of them in the repository",
        )


def clash(paths: Iterable[str]) -> tuple[str, str] | None:
    """Returns two paths that cannot both exist: they differ only in case, or one is a folder of the other.
    None if all can.

    Example:
        >>> clash(["a/b", "A/c"]), clash(["a", "A"]), clash(["a/b", "A"])
        (None, ('a', 'A'), ('a/b', 'A'))
    """
    files: dict[str, str] = {}
    for path in paths:
        if path.casefold() in files:
            return files[path.casefold()], path
        files[path.casefold()] = path
    for folded, path in files.items():
        at = folded.find("/")
        while at >= 0:
            if folded[:at] in files:
                return path, files[folded[:at]]
            at = folded.find("/", at + 1)
    return None
