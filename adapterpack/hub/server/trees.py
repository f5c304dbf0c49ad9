"""Stores the files of a commit in pages sorted by path, so that a listing or lookup reads only a page or two,
however many files there are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import msgspec

from ...io import FrozenStruct

PAGE_FILES = 1000
MAX_FILES = 100_000
_AFTER_SLASH = chr(ord("/") + 1)


class Entry(FrozenStruct):
    """One file of a tree: its bytes, SHA-256 and git blob id (hex), and whether it is listed as a
    large file.
    """

    size: int
    sha256: str
    git: str
    lfs: bool


class Page(FrozenStruct):
    """A page with the files from the path ``first`` on: a blob with this SHA-256, as JSON of path
    -> entry.
    """

    first: str
    count: int
    sha256: str


class Tree(Mapping[str, Entry]):
    """The files of a commit by path, in order. ``load`` reads the blob of a page; the last page is cached.

    Example:
        >>> tree = Tree.of({"a/x": Entry(1, "0" * 64, "0" * 40, False)})
        >>> len(tree), tree["a/x"].size, tree.get("b")
        (1, 1, None)
    """

    def __init__(self, pages: Sequence[Page], load: Callable[[str], bytes]) -> None:
        self.pages = tuple(pages)
        self._load = load
        self._last = (-1, dict[str, Entry]())

    @classmethod
    def of(cls, files: Mapping[str, Entry]) -> Tree:
        """Makes a tree with one page, in memory only."""
        data = encode_files(dict(sorted(files.items())))
        return cls([Page("", len(files), "")] if files else (), lambda sha256: data)

    def __len__(self) -> int:
        return sum(page.count for page in self.pages)

    def __iter__(self) -> Iterator[str]:
        return (path for path, _ in self.from_(""))

    def __getitem__(self, path: str) -> Entry:
        return self._page(max(bisect_right(self._firsts, path) - 1, 0))[path]

    def from_(self, start: str) -> Iterator[tuple[str, Entry]]:
        """Yields the files from the path ``start`` on, in order."""
        for number in range(max(bisect_right(self._firsts, start) - 1, 0), len(self.pages)):
            yield from ((path, entry) for path, entry in self._page(number).items() if path >= start)

    def below(self, folder: str, recursive: bool, after: str = "") -> Iterator[tuple[str, Entry | None]]:
        """Yields the files and folders below a folder, each folder before its contents. Folders have no entry
        and end with a slash.

        ``after`` is the last path of the previous page of a listing.
        """
        prefix = f"{folder}/" if folder else ""
        before = after
        start = max(prefix, after)
        stop = prefix[:-1] + _AFTER_SLASH
        more = True
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
                    # A folder is listed once, before the first of its files.
                    if not before.startswith(parent):
                        yield parent, None
                if parents and not recursive:
                    # skips the contents of that folder
                    start = prefix + parents[0] + _AFTER_SLASH
                    more = True
                    break
                yield path, entry
                before = path

    def with_files(self, files: Mapping[str, Entry], keep: Callable[[bytes], str]) -> Tree:
        """Returns a tree with other files whose pages begin at the same paths, so that most pages exist
        already.

        ``keep`` stores the bytes of a page and returns their SHA-256.
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
"""A path and its new file; None removes the file, or the complete folder."""


def change(files: dict[str, Entry], steps: Sequence[Step]) -> None:
    """Applies steps in order.

    It works backwards, because the last step for a path decides. Each path is then visited once, however many
    steps name the folder that contains it.

    Example:
        >>> files = {path: Entry(1, "", "", False) for path in ("a/x", "a/y", "b")}
        >>> change(files, [("a", None), ("a/x", Entry(2, "", "", False))])
        >>> sorted((path, entry.size) for path, entry in files.items())
        [('a/x', 2), ('b', 1)]
    """
    paths = sorted({*files, *(path for path, entry in steps if entry is not None)})
    open_ = list(range(len(paths) + 1))
    """Union-find: for each path the next one, possibly itself, that no later step has decided."""

    def next_open(at: int) -> int:
        end = at
        while open_[end] != end:
            end = open_[end]
        # Path compression: later lookups jump straight to the end.
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
    """Encodes the files of a page."""
    return msgspec.json.encode(files)


def decode_files(data: bytes) -> dict[str, Entry]:
    """Decodes the files of a page."""
    return msgspec.json.decode(data, type=dict[str, Entry])
