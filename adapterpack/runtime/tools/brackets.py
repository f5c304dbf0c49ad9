"""Finds where a JSON object or list ends while it is still being generated."""

from __future__ import annotations

import re

_MARKS = re.compile(r'\\.?|["{}\[\]]', re.DOTALL)


class Brackets:
    """Finds where the brackets of JSON close in a growing text, ``depth`` of which are open at first. It
    reads each character once.

    Example:
        >>> brackets = Brackets(0)
        >>> brackets.end('{"a}": ['), brackets.end('{"a}": []} and more')
        (None, 10)
    """

    def __init__(self, at: int, depth: int = 0) -> None:
        self._at, self._depth, self._quoted = at, depth, False

    def end(self, said: str) -> int | None:
        """Returns the index after the bracket that closes the outermost open one, or None if it has not come
        yet.
        """
        for match in _MARKS.finditer(said, self._at):
            mark = match[0]
            if mark == "\\":  # the escaped character has not come yet
                self._at = match.start()
                return None
            if mark == '"':
                self._quoted = not self._quoted
            elif not self._quoted and mark in "{[":
                self._depth += 1
            elif not self._quoted and mark in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return match.end()
        self._at = len(said)
        return None
