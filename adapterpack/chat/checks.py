"""The filters and methods that a template may use, and checks of those whose result can be much larger than their arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from string import Formatter
from typing import Any

from jinja2.exceptions import TemplateRuntimeError
from jinja2.filters import make_attrgetter

from .meter import Meter

Arguments = dict[str, Any]

MOST = 10_000
"""The largest width or count in one place."""
_NARROW = 100
"""The largest indent and the most digits after a point."""

METHODS: tuple[tuple[Any, frozenset[str]], ...] = (
    (str, frozenset({
        "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "format_map", "index", "isalnum",
        "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "join",
        "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition",
        "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill",
    })),
    (Mapping, frozenset({"copy", "get", "items", "keys", "values"})),
    (list | tuple | range, frozenset({"copy", "count", "index"})),
    (int | float | bytes, frozenset()),
)
"""The methods that data of each type has."""
NO_FILTERS = frozenset({"pprint", "striptags", "urlize", "wordwrap", "xmlattr"})
"""Filters for web pages, which take long on texts that were made for it."""
_PERCENT = re.compile(r"%(?:\([^()]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?.?", re.DOTALL)
_NESTED = re.compile(r"%\([^()]*\(")


def percent(meter: Meter, text: str, values: Any) -> None:
    """Pays for ``text % values``."""
    widths = [width for match in _PERCENT.finditer(text) for width in match.groups() if width]
    if "*" in widths or _NESTED.search(text):
        raise TemplateRuntimeError("it writes a value with a width that is computed")
    _formatted(meter, text, widths, text.count("%"), values)


def _format(meter: Meter, text: str, *values: Any, **named: Any) -> None:
    specs = [spec or "" for _, name, spec, _ in Formatter().parse(text) if name is not None]
    if any("{" in spec for spec in specs):
        raise TemplateRuntimeError("it writes a value with a width that is computed")
    _formatted(meter, text, re.findall(r"\d+", " ".join(specs)), len(specs), [values, named])


def _formatted(meter: Meter, text: str, widths: Iterable[str], count: int, values: Any) -> None:
    sizes = [int(width) for width in widths]
    for size in sizes:
        _count(size)
    meter.spend(len(text) + sum(sizes) + count * meter.size(values))


def _count(number: Any, most: int = MOST) -> None:
    if isinstance(number, int | float) and not -most <= number <= most:
        raise TemplateRuntimeError(f"it asks for {number:.6g} in one place, where {most} is the most")


def _replaced(meter: Meter, text: Any, old: Any, new: Any, count: int | None = None) -> None:
    times = str(text).count(str(old))
    meter.spend(len(str(text)) + (times if count is None or count < 0 else min(times, count)) * len(str(new)))


def _joined(meter: Meter, separator: Any, values: Iterable[Any]) -> tuple[list[Any]]:
    kept = list(values)
    meter.spend(sum(map(meter.size, kept)) + len(kept) * len(str(separator)))
    return (kept,)


def _padded(meter: Meter, text: str, width: int = 0, *fill: str) -> None:
    _count(width)


def _expanded(meter: Meter, text: str, tabsize: int = 8) -> None:
    _count(tabsize, _NARROW)


TEXT_METHODS: dict[str, Callable[..., tuple[Any, ...] | None]] = {
    "center": _padded, "ljust": _padded, "rjust": _padded, "zfill": _padded, "expandtabs": _expanded, "replace": _replaced,
    "join": _joined, "format": _format, "format_map": _format,
}
"""Method of a text -> what is checked: with the text and the arguments; it may give others in their place."""


def _attributes(arguments: Arguments, environment: Any, key: str) -> list[Any]:
    """The values that a filter looks at, whose attribute it takes where one is named."""
    values, attribute = arguments[key], arguments["attribute"]
    arguments["attribute"] = None
    return list(values if attribute is None else map(make_attrgetter(environment, attribute), values))


def _join(meter: Meter, arguments: Arguments) -> None:
    values = _attributes(arguments, arguments["eval_ctx"].environment, "value")
    (arguments["value"],) = _joined(meter, arguments["d"], values)


def _sum(meter: Meter, arguments: Arguments) -> None:
    arguments["iterable"] = _attributes(arguments, arguments["environment"], "iterable")
    if not all(isinstance(value, int | float) for value in (*arguments["iterable"], arguments["start"])):
        raise TemplateRuntimeError("only numbers can be summed up")  # lists would be put together again and again


def _indent(meter: Meter, arguments: Arguments) -> None:
    text, width = str(arguments["s"]), arguments["width"]
    _count(width)
    meter.spend(len(text) + (len(text.splitlines()) + 1) * (len(width) if isinstance(width, str) else width))


def _all_counts(*names: str, most: int = MOST) -> Callable[[Meter, Arguments], None]:
    def check(meter: Meter, arguments: Arguments) -> None:
        for name in names:
            _count(arguments[name], most)

    return check


FILTERS: dict[str, Callable[[Meter, Arguments], None]] = {
    "center": _all_counts("width"), "batch": _all_counts("linecount"), "slice": _all_counts("slices"),
    "round": _all_counts("precision", most=_NARROW), "indent": _indent, "join": _join, "sum": _sum,
    "replace": lambda meter, values: _replaced(meter, values["s"], values["old"], values["new"], values["count"]),
    "format": lambda meter, values: percent(meter, str(values["value"]), values["kwargs"] or values["args"]),
}
"""Filter -> what is checked: with its arguments by name, which it may change."""


def tojson(meter: Meter, value: Any, indent: Any, **options: Any) -> str:
    """A value as JSON, paid for piece by piece."""
    _count(len(indent) if isinstance(indent, str) else indent, _NARROW)
    pieces = []
    for piece in json.JSONEncoder(indent=indent, **options).iterencode(value):
        meter.spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)
