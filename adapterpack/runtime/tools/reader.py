"""Reads calls of tools out of an answer while it grows."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from ..text.text_stream import overlap
from .family import Call, ToolFamily

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"
_BETWEEN = f"{_SPACE},;"
_NAME = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*")


class CallReader:
    """What an answer says and calls: ``text`` is what is no call, and only grows; ``calls`` are those that are complete, at most ``most``.

    Text that may become a call is kept back until it is clear. What looks like a call and is none, or calls a tool that is not among
    ``names``, is text.

    Example:
        >>> from adapterpack.runtime.tools.family import FAMILIES
        >>> reader = CallReader(FAMILIES["hermes"], {"weather"})
        >>> reader.read('Let me see. <tool_call>{"name": "weather", "arguments": {"town": "Bern"}}</tool_call>', ended=True)
        >>> reader.text, reader.calls
        ('Let me see.', [Call(name='weather', arguments='{"town": "Bern"}')])
    """

    def __init__(self, family: ToolFamily, names: Collection[str], most: int | None = None) -> None:
        self._family, self._names, self._most = family, names, most
        self._marks = [mark for mark in (family.marker, *family.others) if mark]
        self._closing = family.closing.strip()
        self.text, self.calls = "", list[Call]()
        self._at = 0  # so much of the answer has been read
        self._after: int | None = None  # where the call stands that is being read
        self._behind = False  # whether a call has just been read, behind which something may stand

    def read(self, said: str, ended: bool) -> None:
        """Takes the answer so far; ``ended``: it is all of it."""
        while self._find(said, ended) if self._after is None else self._call(said, ended, self._after):
            pass

    def _find(self, said: str, ended: bool) -> bool:
        """Gives text out up to the next mark of a call; whether there is one."""
        if self._behind and not self._closed(said, ended):
            return False
        found = [(at, len(mark)) for mark in self._marks if (at := said.find(mark, self._at)) >= 0]
        begin = _past(said, self._at, _BETWEEN)
        if not self._family.marker and not self.text and said.startswith("{", begin):
            found.append((begin, 0))
        at, size = min(found, default=(len(said), 0))
        text = said[self._at : at]
        if not found and not ended:
            text = text[: len(text) - max((overlap(text, mark) for mark in self._marks), default=0)]
        if found or not ended:
            text = text.rstrip()
        if text.strip(_BETWEEN if self.calls else None) or (ended and not self.calls):
            self.text += text
            self._at += len(text)
        if found:
            self._at, self._after = at, at + size
        return bool(found)

    def _closed(self, said: str, ended: bool) -> bool:
        """Skips what closes a call; False while it is not clear whether that follows."""
        behind = _past(said, self._at, _SPACE)
        if said.startswith(self._closing, behind):
            self._at = behind + len(self._closing)
        elif self._closing.startswith(said[behind:]):
            if not ended:
                return False
            self._at = len(said)  # it was cut off
        self._behind = False
        return True

    def _call(self, said: str, ended: bool, after: int) -> bool:
        """Reads the calls that stand there; False while they are not complete."""
        value = self._values(said, after)
        if value is None and not ended:
            return False
        values, end = value or ([], len(said))
        calls = [call for one in values for call in self._one(one)]
        if calls and len(calls) == len(values):
            self.calls += calls[: None if self._most is None else self._most - len(self.calls)]
            self._behind = True
        else:
            self.text += said[self._at : end]
        self._at, self._after = end, None
        return True

    def _values(self, said: str, at: int) -> tuple[list[Any], int] | None:
        """The calls that stand there as JSON, and where they end."""
        name = None
        if self._family.named is not None:
            match = _NAME.match(said, at)
            if match is None or not said.startswith(self._family.named, match.end()):
                return None
            name, at = match[1], match.end() + len(self._family.named)
        try:
            value, end = _DECODER.raw_decode(said, _past(said, at, _SPACE))
        except (ValueError, RecursionError):
            return None
        if name is not None:
            value = {"name": name, self._family.arguments: value}
        return (value if isinstance(value, list) else [value]), end

    def _one(self, value: Any) -> Iterator[Call]:
        if isinstance(value, dict) and isinstance(name := value.get("name"), str) and name in self._names:
            arguments = value.get(self._family.arguments, {})
            if isinstance(arguments, dict):
                yield Call(name, json.dumps(arguments, ensure_ascii=False))


def _past(text: str, at: int, characters: str) -> int:
    """The place behind these characters."""
    while at < len(text) and text[at] in characters:
        at += 1
    return at
