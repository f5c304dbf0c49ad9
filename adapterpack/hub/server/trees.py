"""Keeps the files of a commit in pages by their paths, so that a listing or a look-up reads a page or two,
however many files there are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import msgspec

PAGE_FILES = 1000
MAX_FILES = 100_000
_AFTER_SLASH = chr(ord("/") + 1)


class Entry(msgspec.Struct, frozen=True):
    """One file of a tree: bytes, sha256 and git's blob id (hex), and whether it is listed as a large file."""

    size: int
    sha256: str
    git: str
    lfs: bool


class Page(msgspec.Struct, frozen=True):
    """Where some files of a commit are described, those from ``first`` on: in the blob of this sha256, as
    JSON of path -> entry.
    """

    first: str
    count: int
    sha256: str


class Tree(Mapping[str, Entry]):
    """The files of a commit by their paths, in order; ``load`` reads the blob of a page, and the last one
    that was read is kept.

    Example:
        >>> tree = Tree.of({"a/x": Entry(1, "0" * 64, "0" * 40, False)})
        >>> len(tree), tree["a/x"].size, tree.get("b")
        (1, 1, None)
    """

    def __init__(self, pages: Sequence[Page], load: Callable[[str], bytes]) -> None:
        self.pages, self._load, self._last = tuple(pages), load, (-1, dict[str, Entry]())

    @classmethod
    def of(cls, files: Mapping[str, Entry]) -> Tree:
        """A tree in memory alone, on one page."""
        data = encode_files(dict(sorted(files.items())))
        return cls([Page("", len(files), "")] if files else (), lambda sha256: data)

    def __len__(self) -> int:
        return sum(page.count for page in self.pages)

    def __iter__(self) -> Iterator[str]:
        return (path for path, _ in self.from_(""))

    def __getitem__(self, path: str) -> Entry:
        return self._page(max(bisect_right(self._firsts, path) - 1, 0))[path]

    def from_(self, start: str) -> Iterator[tuple[str, Entry]]:
        """The files whose paths are not before ``start``, in order."""
        for number in range(max(bisect_right(self._firsts, start) - 1, 0), len(self.pages)):
            yield from ((path, entry) for path, entry in self._page(number).items() if path >= start)

    def below(self, folder: str, recursive: bool, after: str = "") -> Iterator[tuple[str, Entry | None]]:
        """Folders (without an entry, and with a slash at the end) and files below a folder, each folder
        before what lies in it.

        ``after`` is the last one of those that came before, so that a listing can go on there.
        """
        prefix = f"{folder}/" if folder else ""
        before, start, stop, more = after, max(prefix, after), prefix[:-1] + _AFTER_SLASH, True
        while more:
            more = False
            for path, entry in self.from_(start):
                if prefix and path >= stop:
                    return
                if path == after:
                    continue
                parents = path[len(prefix) :].split("/")[:-1]
                for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                    parent = prefix + "/".join(parents[:depth]) + "/"
                    if not before.startswith(parent):
                        yield parent, None
                if parents and not recursive:
                    # what lies in that folder is read over
                    start, more = prefix + parents[0] + _AFTER_SLASH, True
                    break
                yield path, entry
                before = path

    def with_files(self, files: Mapping[str, Entry], keep: Callable[[bytes], str]) -> Tree:
        """A tree with other files, whose pages begin where those of this one do, so that most of them are
        there already.

        ``keep`` stores the bytes of a page, and returns their sha256.
        """
        groups: dict[int, list[tuple[str, Entry]]] = {}
        for path, entry in sorted(files.items()):
            groups.setdefault(bisect_right(self._firsts, path), []).append((path, entry))
        pages = []
        for group in groups.values():
            size = len(group) if len(group) <= 2 * PAGE_FILES else PAGE_FILES
            for start in range(0, len(group), size):
                some = group[start : start + size]
                pages.append(Page(some[0][0], len(some), keep(encode_files(dict(some)))))
        return Tree(pages, self._load)

    @cached_property
    def _firsts(self) -> list[str]:
        return [page.first for page in self.pages]

    def _page(self, number: int) -> dict[str, Entry]:
        if not self.pages:
            return {}
        if self._last[0] != number:
            self._last = number, decode_files(self._load(self.pages[number].sha256))
        return self._last[1]


Step = tuple[str, Entry | None]
"""A path and the file that is there from now on; None removes that file, or all that lies in that folder."""


def change(files: dict[str, Entry], steps: Sequence[Step]) -> None:
    """Takes the steps, one after the other.

    From the last one back: what it says of a path is what becomes of it, so that each path is looked at once,
    however many steps name the folder that it lies in.

    Example:
        >>> files = {path: Entry(1, "", "", False) for path in ("a/x", "a/y", "b")}
        >>> change(files, [("a", None), ("a/x", Entry(2, "", "", False))])
        >>> {path: entry.size for path, entry in files.items()}
        {'b': 1, 'a/x': 2}
    """
    paths = sorted({*files, *(path for path, entry in steps if entry is not None)})
    open_ = list(range(len(paths) + 1))
    """Of each path the next one, itself at best, of which no later step has said anything."""

    def next_open(at: int) -> int:
        end = at
        while open_[end] != end:
            end = open_[end]
        while open_[at] != end:
            at, open_[at] = open_[at], end
        return end

    for path, entry in reversed(steps):
        first = bisect_left(paths, path)
        spans = [(first, first + (paths[first : first + 1] == [path]))]
        if entry is None:
            spans.append((bisect_left(paths, f"{path}/"), bisect_left(paths, path + _AFTER_SLASH)))
        for start, stop in spans:
            while (start := next_open(start)) < stop:
                open_[start] = start + 1
                if entry is None:
                    files.pop(paths[start], None)
                else:
                    files[paths[start]] = entry


def encode_files(files: Mapping[str, Entry]) -> bytes:
    """The bytes of a page."""
    return msgspec.json.encode(files)


def decode_files(data: bytes) -> dict[str, Entry]:
    """The files on a page."""
    return msgspec.json.decode(data, type=dict[str, Entry])
