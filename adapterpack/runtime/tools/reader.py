"""Parses tool calls from an answer while it is generated.

The reader is a state machine: ``_step`` is the method for the current state, and returns whether the next
state may continue at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, NamedTuple

from ..text import overlap
from .family import Call, ToolFamily

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"
_BETWEEN = f"{_SPACE},;"
_BRACKETS = re.compile(r'\\.?|["{}\[\]]', re.DOTALL)
_NAME = r"(?P<name>[A-Za-z0-9_.-]{1,64})"


class AnswerPiece(NamedTuple):
    """The next piece of an answer: ``text``, the ``name`` of a call that begins, a piece of its
    ``arguments``, or its ``end``.
    """

    kind: Literal["text", "name", "arguments", "end"]
    value: str = ""


class Brackets:
    """Finds where the brackets of JSON close in a growing text, ``depth`` of which are open at first. It
    reads each character once.

    Example:
        >>> brackets = Brackets(0)
        >>> brackets.end('{"a}": ['), brackets.end('{"a}": []} and more')
        (None, 10)
    """

    def __init__(self, at: int, depth: int = 0) -> None:
        self._at = at
        self._depth = depth
        self._quoted = False

    def end(self, said: str) -> int | None:
        """Returns the index after the bracket that closes the outermost open one, or None if it has not come
        yet.
        """
        for match in _BRACKETS.finditer(said, self._at):
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


class CallReader:
    """Splits an answer into ``text`` and at most ``most`` tool ``calls``, the last of which may still be
    growing.

    Text that may become a call is held back until that is decided. A call begins once its name, which must be
    among ``names``, and the opening brace of its arguments are there. Its arguments are the model's text,
    even if the answer is cut off in them. Text that resembles a call but is none stays text.

    Example:
        >>> from adapterpack.runtime.tools.family import FAMILIES
        >>> reader = CallReader(FAMILIES["hermes"], {"weather"})
        >>> start = 'Let me see. <tool_call>{"name": "weather", "arguments": {"town"'
        >>> [(piece.kind, piece.value) for piece in reader.read(start, ended=False)]
        [('text', 'Let me see.'), ('name', 'weather'), ('arguments', '{"town"')]
        >>> reader.calls
        [Call(name='weather', arguments='{"town"')]
    """

    def __init__(self, family: ToolFamily, names: Collection[str], most: int | None = None) -> None:
        self._family = family
        self._names = names
        self._most = most
        self._marks = [mark for mark in (family.marker, *family.others) if mark]
        self._head = _head(family)
        self._closing = family.closing.strip()
        self.text = ""
        self.calls = list[Call]()
        self._pieces: list[AnswerPiece] = []
        self._step: Callable[[str, bool], bool] = self._text
        self._at = 0  # the index up to which the answer has been read
        self._call_at = 0  # the index at which a possible call begins
        self._listed = False  # whether the current call is part of a list
        self._brackets = Brackets(0)
        self._left_out = False  # whether the current call exceeds ``most`` and is dropped

    def read(self, said: str, ended: bool) -> list[AnswerPiece]:
        """Takes the answer so far and returns the pieces that are new since the last call; ``ended`` says
        that the answer is complete.
        """
        self._pieces = []
        while self._step(said, ended):
            pass
        return self._pieces

    def _text(self, said: str, ended: bool) -> bool:
        """Emits text up to the next mark of a call, and returns whether there is a mark."""
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
            self._say(text)
            self._at += len(text)
        if found:
            self._at = at
            self._call_at = at + size
            self._listed = False
            self._step = self._begin
        return bool(found)

    def _begin(self, said: str, ended: bool) -> bool:
        """Reads a call up to its arguments. If they do not directly follow the name, reads the complete call
        as JSON instead.
        """
        match = self._head.match(said, self._call_at)
        if match is not None and match["name"] in self._names:
            self._listed |= bool(match.groupdict().get("list"))
            self._open(match["name"])
            self._at = match.end()
            self._brackets = Brackets(match.end())
            self._step = self._arguments
            return True
        value = self._values(said, self._call_at)
        if value is None and not ended:
            return False
        values, end = value or ([], len(said))
        calls = [call for one in values for call in self._one(one)]
        well = bool(calls) and len(calls) == len(values)
        for call in calls if well else ():
            self._open(call.name)
            self._argue(call.arguments)
            self._end()
        if not well:
            self._say(said[self._at : end])
        self._at = end
        self._step = self._next if self._listed else self._close if well else self._text
        return True

    def _arguments(self, said: str, ended: bool) -> bool:
        """Emits arguments as they arrive."""
        end = self._brackets.end(said)
        self._argue(said[self._at : end])
        self._at = len(said) if end is None else end
        if end is None:
            return False
        self._end()
        self._brackets = Brackets(end, 1)
        self._step = self._close if self._family.named else self._rest
        return True

    def _rest(self, said: str, ended: bool) -> bool:
        """Skips the rest of a call's object after the arguments: other keys and the closing brace."""
        at = _past(said, self._at, _SPACE)
        end = self._brackets.end(said) if said[at : at + 1] in ("}", ",") else None if at == len(said) else at
        if end is None and not ended:
            return False
        self._at = len(said) if end is None else end
        self._step = self._next if self._listed else self._close
        return True

    def _next(self, said: str, ended: bool) -> bool:
        """Continues with the next call of a list, or after the list."""
        at = _past(said, self._at, _SPACE)
        if at == len(said) and not ended:
            return False
        if said.startswith(",", at):
            self._at = at
            self._call_at = at + 1
            self._step = self._begin
        else:
            self._at = at + said.startswith("]", at)
            self._step = self._close
        return True

    def _close(self, said: str, ended: bool) -> bool:
        """Skips the closing mark of a call. Returns False while it may still arrive."""
        behind = _past(said, self._at, _SPACE)
        if said.startswith(self._closing, behind):
            self._at = behind + len(self._closing)
        elif self._closing.startswith(said[behind:]):
            if not ended:
                return False
            self._at = len(said)  # the closing mark was cut off
        self._step = self._text
        return True

    def _values(self, said: str, at: int) -> tuple[list[Any], int] | None:
        """Parses complete calls as JSON at an index, and returns them with the index of their end, or None if
        they are incomplete.
        """
        head = None
        if self._family.named is not None:
            head = self._head.match(said, at)
            if head is None:
                return None
            at = head.end()
        try:
            value, end = _DECODER.raw_decode(said, _past(said, at, _SPACE))
        except (ValueError, RecursionError):
            return None
        if head is not None:
            value = {"name": head["name"], self._family.arguments: value}
        return (value if isinstance(value, list) else [value]), end

    def _one(self, value: Any) -> Iterator[Call]:
        if isinstance(value, dict) and isinstance(name := value.get("name"), str) and name in self._names:
            arguments = value.get(self._family.arguments, {})
            if isinstance(arguments, dict):
                yield Call(name, json.dumps(arguments, ensure_ascii=False))

    def _say(self, text: str) -> None:
        if text:
            self.text += text
            self._pieces.append(AnswerPiece("text", text))

    def _open(self, name: str) -> None:
        self._left_out = self._most is not None and len(self.calls) >= self._most
        if not self._left_out:
            self.calls.append(Call(name, ""))
            self._pieces.append(AnswerPiece("name", name))

    def _argue(self, text: str) -> None:
        if text and not self._left_out:
            self.calls[-1] = Call(self.calls[-1].name, self.calls[-1].arguments + text)
            self._pieces.append(AnswerPiece("arguments", text))

    def _end(self) -> None:
        if not self._left_out:
            self._pieces.append(AnswerPiece("end"))


def _head(family: ToolFamily) -> re.Pattern[str]:
    """Returns the pattern of a call up to its arguments, after the marker or inside of a list."""
    if family.named is not None:
        return re.compile(rf"\s*{_NAME}\s*{re.escape(family.named)}\s*(?=\{{)")
    return re.compile(
        rf'\s*(?P<list>\[\s*)?\{{\s*"name"\s*:\s*"{_NAME}"'
        rf'\s*,\s*"{re.escape(family.arguments)}"\s*:\s*(?=\{{)'
    )


def _past(text: str, at: int, characters: str) -> int:
    """Returns the first index at or after ``at`` with another character."""
    while at < len(text) and text[at] in characters:
        at += 1
    return at
