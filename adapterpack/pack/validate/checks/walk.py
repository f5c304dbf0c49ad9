"""Traverses an untrusted JSON value of any nesting, in time and memory proportional to its size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Location(NamedTuple):
    """A place in a JSON value: the enclosing place, and the key or index there. The pointer is only built on
    demand.
    """

    around: Location | None = None
    key: str | int = ""

    @property
    def pointer(self) -> str:
        """The JSON pointer to the place (RFC 6901)."""
        parts = []
        place = self
        while place.around is not None:
            parts.append(str(place.key).replace("~", "~0").replace("/", "~1"))
            place = place.around
        return "".join(f"/{part}" for part in reversed(parts))


def texts_in(value: Any) -> set[str]:
    """Returns every key and every string in a value, each once, because most of the thousands in a manifest
    are the same few.

    Example:
        >>> sorted(texts_in({"a": ["b", {"a": 5}]}))
        ['a', 'b']
    """
    found = set()
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, str):
            found.add(inner)
        elif isinstance(inner, dict):
            found.update(inner)
            left.extend(inner.values())
        elif isinstance(inner, list):
            left.extend(inner)
    return found


def walk(value: Any) -> Iterator[tuple[Location, Any]]:
    """Yields the value and every value inside it, outer ones first, each with its place.

    Example:
        >>> [(place.pointer, inner) for place, inner in walk({"a/b": [5]})][1:]
        [('/a~1b', [5]), ('/a~1b/0', 5)]
    """
    # A stack of iterators holds one entry per level, however many items a level has.
    left = [iter([(Location(), value)])]
    while left:
        located = next(left[-1], None)
        if located is None:
            left.pop()
            continue
        yield located
        place, inner = located
        if isinstance(inner, dict):
            left.append(_inside(place, inner.items()))
        elif isinstance(inner, list):
            left.append(_inside(place, enumerate(inner)))


def _inside(around: Location, entries: Any) -> Iterator[tuple[Location, Any]]:
    return ((Location(around, key), item) for key, item in entries)
