"""Where a JSON object or list ends that is still being written."""

from __future__ import annotations

import re

_MARKS = re.compile(r'\\.?|["{}\[\]]', re.DOTALL)


class Brackets:
    """Finds where JSON's brackets close in a text that grows, of which ``depth`` are open at first; no
    character is read twice.

    Example:
        >>> brackets = Brackets(0)
        >>> brackets.end('{"a}": ['), brackets.end('{"a}": []} and more')
        (None, 10)
    """

    def __init__(self, at: int, depth: int = 0) -> None:
        self._at, self._depth, self._quoted = at, depth, False

    def end(self, said: str) -> int | None:
        """The place behind the bracket that closes the last one that was open; None while it is not there."""
        for match in _MARKS.finditer(said, self._at):
            mark = match[0]
            if mark == "\\":  # what it stands before has not come yet
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
