"""Renders pages from the jinja2 templates in ``templates/``; the environment escapes every value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup, escape

from ..errors import printable
from ..palette import DARK, LIGHT, variables
from ..readable import MISSING, count, percent, seconds, small
from ..resources import templates

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE = b"default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The Content-Security-Policy that every page has near its beginning: the page loads nothing."""
_FIGURE = re.compile(
    rf"{MISSING}|–|[-<]? ?[\d.,]+(e[-+]?\d+)?( ?(%|[kMGT]?B|m?s|min \d+ s|times|million|billion))?"
)
_SHARE = re.compile(r"([\d.]+) %")
Table = tuple[list[str], list[list[str]]]
"""The names of the columns, and the rows."""


class Card(NamedTuple):
    """A key figure: its name, its value, and a short remark."""

    label: str
    value: str
    note: str = ""


def render(name: str, /, **values: Any) -> str:
    """Fills the template ``name`` with these values; a value that it names and does not get is an error.

    Example:
        >>> "--page:#ffffff" in render("style.css.jinja")
        True
    """
    return page_environment().get_template(name).render(**values)


@cache
def page_environment() -> Environment:
    """Returns the environment of the pages' templates: markup in a value is shown as text; only
    :class:`markupsafe.Markup` passes as it is.
    """
    made = templates(__package__, escape_value)
    made.filters.update(
        count=count, percent=percent, seconds=seconds, small=small, figures=find_figures, bar=bar_length
    )
    made.globals.update(light=LIGHT, dark=DARK, variables=variables)
    return made


def escape_value(value: object) -> Markup:
    """Makes a value safe in HTML and SVG, between tags and in quoted attributes: no markup, no control or
    bidirectional characters. Markup passes as it is.

    Example:
        >>> print(escape_value('<b title="x">' + chr(0x202e)), escape_value(escape_value("1 < 2")))
        &lt;b title=&#34;x&#34;&gt;\\u202e 1 &lt; 2
    """
    if isinstance(value, Markup):
        return value
    # XML 1.0 has no U+FFFE and no U+FFFF, which are neither control nor private.
    return escape(printable(str(value)).replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff"))


def find_figures(rows: Sequence[Sequence[object]]) -> set[int]:
    """Finds the columns of a table that hold figures alone, which are set flush right.

    Example:
        >>> find_figures([["a", "1.3 MB"], ["2", "n/a"]])
        {1}
    """
    return {
        at
        for at, cells in enumerate(zip(*rows, strict=True))
        if all(_FIGURE.fullmatch(str(cell)) for cell in cells)
    }


def bar_length(cell: object) -> str:
    """Returns how long the bar behind a share is, as CSS has it; other cells have none.

    Example:
        >>> bar_length("88.0 %"), bar_length("1.3 MB")
        ('88.0%', '')
    """
    found = _SHARE.fullmatch(str(cell))
    return f"{found[1]}%" if found else ""
