"""Parses trees of composition from text: ``sum(0.7*a, stack(b, c))``, ``arrow(a, b, top_k=1)``.

    tree   := [number "*"] (name | kind "(" item {"," item} ")")
    item   := tree | setting "=" value
    value  := number {":" number} | "true" | "false" | "none"

A number in front is the child's weight in a sum; anywhere else it makes a sum of one.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from ..adapter_methods.nodes import Leaf, Tree, decode, encode, get_kind, node
from ..adapter_methods.nodes.sums import SumSettings
from ..adapter_methods.nodes.tree import MAX_DEPTH, MEMBER
from ..errors import ConfigError, FormatError

MAX_LENGTH = 4096
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][+-]?\d{1,3})?)(?![A-Za-z0-9_-])"
    r"|(?P<name>[A-Za-z0-9][A-Za-z0-9_-]{0,63})|(?P<sign>[(),=*:]))"
)
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


class _Token(NamedTuple):
    what: str
    text: str
    place: int


def parse(text: str) -> Tree:
    """Parses the text of a tree.

    Raises:
        ConfigError: it is malformed, too long, too deep or too large; names the place.

    Example:
        >>> parse("sum(0.7*a, b)").settings.weights
        (0.7, 1.0)
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(
            "the tree is too long",
            where="tree",
            expected=f"at most {MAX_LENGTH} characters",
            found=len(text),
            remedy="write it in a JSON file",
        )
    reader = _Reader(text)
    try:
        weight, tree = reader.tree(1)
        if reader.token.what != "end":
            raise reader.wrong("the end")
        # whatever was written, within the limits of what is stored
        return decode(encode(_weigh(weight, tree)))
    except FormatError as error:
        raise ConfigError(
            error.what,
            where=f"tree{error.where or ''}",
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from None


class _Reader:
    def __init__(self, text: str) -> None:
        self.tokens: list[_Token] = []
        place = 0
        stripped = len(text.rstrip())
        while place < stripped:
            match = _TOKEN.match(text, place)
            if match is None:
                raise ConfigError(
                    "the tree cannot be read",
                    where=f"tree, character {place + 1}",
                    found=repr(text[place : place + 20]),
                    expected="a name, a number or one of ( ) , = * :",
                )
            self.tokens.append(
                _Token(
                    str(match.lastgroup),
                    match.group(str(match.lastgroup)),
                    match.start(str(match.lastgroup)) + 1,
                )
            )
            place = match.end()
        self.tokens.append(_Token("end", "", len(text) + 1))
        self.at = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def ahead(self, text: str) -> bool:
        return self.tokens[min(self.at + 1, len(self.tokens) - 1)].text == text

    def take(self, *expected: str) -> _Token:
        token = self.token
        if token.what not in expected and token.text not in expected:
            raise self.wrong(" or ".join(expected))
        self.at += 1
        return token

    def wrong(self, expected: str) -> ConfigError:
        return ConfigError(
            "the tree cannot be read",
            where=f"tree, character {self.token.place}",
            expected=expected,
            found=repr(self.token.text or "the end"),
        )

    def tree(self, depth: int) -> tuple[float | None, Tree]:
        """Reads a subtree and the weight in front of it."""
        weight = None
        if self.token.what == "number" and self.ahead("*"):
            weight = _number(self.take("number"))
            self.take("*")
        name = self.take("name", "number") if self.token.text.isdecimal() else self.take("name")
        if self.token.text != "(":
            if not MEMBER.fullmatch(name.text):
                raise ConfigError(
                    "no member can have that name",
                    where=f"tree, character {name.place}",
                    found=repr(name.text),
                )
            return weight, Leaf(name.text)
        if depth > MAX_DEPTH:
            raise ConfigError(
                "the tree is too deep",
                where=f"tree, character {name.place}",
                expected=f"at most {MAX_DEPTH} levels",
            )
        return weight, self._node(name.text, depth)

    def _node(self, name: str, depth: int) -> Tree:
        kind = get_kind(name, "")
        children = []
        settings = {}
        self.take("(")
        while True:
            if self.token.what == "name" and self.ahead("="):
                key = self.take("name").text
                self.take("=")
                if key in settings:
                    raise ConfigError("a setting is given twice", where=f"tree, {name}", found=key)
                settings[key] = self._value()
            else:
                children.append(self.tree(depth + 1))
            if self.take(",", ")").text == ")":
                break
        if kind.settings is SumSettings:
            if "weights" not in settings:
                settings["weights"] = [1.0 if weight is None else weight for weight, _ in children]
            below = tuple(child for _, child in children)
        else:
            below = tuple(_weigh(weight, child) for weight, child in children)
        return node(kind, below, settings, f", {name}")

    def _value(self) -> Any:
        token = self.take("number", "name")
        if token.what == "name" and token.text not in _WORDS:
            raise ConfigError(
                "a setting has a value that cannot be read",
                where=f"tree, character {token.place}",
                found=repr(token.text),
                expected="a number, true, false or none",
            )
        if token.what == "name":
            return _WORDS[token.text]
        values = [_number(token)]
        while self.token.text == ":":
            self.take(":")
            values.append(_number(self.take("number")))
        return values[0] if len(values) == 1 else values


def _number(token: _Token) -> Any:
    value = int(token.text) if re.fullmatch(r"[+-]?\d+", token.text) else float(token.text)
    if not math.isfinite(value):
        raise ConfigError(
            "a number of the tree is not finite", where=f"tree, character {token.place}", found=token.text
        )
    return value


def _weigh(weight: float | None, tree: Tree) -> Tree:
    return tree if weight is None else node(get_kind("sum", ""), (tree,), {"weights": [float(weight)]}, "")
