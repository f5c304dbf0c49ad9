"""Reads calls of tools out of an answer while it grows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, NamedTuple

from ..text.detokenizer import overlap
from .brackets import Brackets
from .family import Call, ToolFamily

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"
_BETWEEN = f"{_SPACE},;"
_NAME = r"(?P<name>[A-Za-z0-9_.-]{1,64})"


class AnswerPiece(NamedTuple):
    """What an answer says next: ``text``; the ``name`` of a call that begins, pieces of its ``arguments``,
    and its ``end``.
    """

    kind: Literal["text", "name", "arguments", "end"]
    value: str = ""


class CallReader:
    """Splits an answer into ``text`` and at most ``most`` ``calls`` of tools, the last of which may still be
    growing.

    Text that may become a call is kept back until it is clear. A call begins once its name, one of ``names``,
    and the brace of its arguments are there, and these are what the model writes, also where it is cut off in
    them. What looks like a call and is none is text.

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
        self._family, self._names, self._most = family, names, most
        self._marks = [mark for mark in (family.marker, *family.others) if mark]
        self._head, self._closing = _head(family), family.closing.strip()
        self.text, self.calls = "", list[Call]()
        self._pieces: list[AnswerPiece] = []
        self._step: Callable[[str, bool], bool] = self._text
        self._at = 0  # so much of the answer has been read
        self._call_at = 0  # where the call stands that may begin
        self._listed = False  # whether it is one of a list
        self._brackets = Brackets(0)
        self._left_out = False  # whether the call that is being read is one too many

    def read(self, said: str, ended: bool) -> list[AnswerPiece]:
        """What the answer so far adds to what was read of it; ``ended``: it is all of it."""
        self._pieces = []
        while self._step(said, ended):
            pass
        return self._pieces

    def _text(self, said: str, ended: bool) -> bool:
        """Gives text out up to the next mark of a call; whether there is one."""
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
            self._at, self._call_at, self._listed, self._step = at, at + size, False, self._begin
        return bool(found)

    def _begin(self, said: str, ended: bool) -> bool:
        """Reads up to the arguments of a call. Where these do not stand behind its name, the call is read as
        a whole.
        """
        match = self._head.match(said, self._call_at)
        if match is not None and match["name"] in self._names:
            self._listed |= bool(match.groupdict().get("list"))
            self._open(match["name"])
            self._at, self._brackets, self._step = match.end(), Brackets(match.end()), self._arguments
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
        """Gives out the arguments as they come."""
        end = self._brackets.end(said)
        self._argue(said[self._at : end])
        self._at = len(said) if end is None else end
        if end is None:
            return False
        self._end()
        self._brackets, self._step = Brackets(end, 1), self._close if self._family.named else self._rest
        return True

    def _rest(self, said: str, ended: bool) -> bool:
        """Skips what stands behind the arguments in the object of a call: other keys, and its brace."""
        at = _past(said, self._at, _SPACE)
        end = self._brackets.end(said) if said[at : at + 1] in ("}", ",") else None if at == len(said) else at
        if end is None and not ended:
            return False
        self._at = len(said) if end is None else end
        self._step = self._next if self._listed else self._close
        return True

    def _next(self, said: str, ended: bool) -> bool:
        """Goes on to the next call of a list, or behind the list."""
        at = _past(said, self._at, _SPACE)
        if at == len(said) and not ended:
            return False
        if said.startswith(",", at):
            self._at, self._call_at, self._step = at, at + 1, self._begin
        else:
            self._at, self._step = at + said.startswith("]", at), self._close
        return True

    def _close(self, said: str, ended: bool) -> bool:
        """Skips what closes a call; False while it is not clear whether that follows."""
        behind = _past(said, self._at, _SPACE)
        if said.startswith(self._closing, behind):
            self._at = behind + len(self._closing)
        elif self._closing.startswith(said[behind:]):
            if not ended:
                return False
            self._at = len(said)  # it was cut off
        self._step = self._text
        return True

    def _values(self, said: str, at: int) -> tuple[list[Any], int] | None:
        """The calls that stand there as JSON, and where they end."""
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
    """What stands before the arguments of a call, behind the marker or in a list."""
    if family.named is not None:
        return re.compile(rf"\s*{_NAME}\s*{re.escape(family.named)}\s*(?=\{{)")
    return re.compile(
        rf'\s*(?P<list>\[\s*)?\{{\s*"name"\s*:\s*"{_NAME}"'
        rf'\s*,\s*"{re.escape(family.arguments)}"\s*:\s*(?=\{{)'
    )


def _past(text: str, at: int, characters: str) -> int:
    """The place behind these characters."""
    while at < len(text) and text[at] in characters:
        at += 1
    return at
