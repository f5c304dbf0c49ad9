"""Text that goes into a page: escaped, and measured so that no label of a figure is ever cut off."""

from __future__ import annotations

import unicodedata

from markupsafe import Markup, escape

from ..errors import printable

FONT_SIZE = 13
"""The size of every text in a figure, in px."""
_WIDTHS = (("mwMW%@", 1.12), ("<>=+~#^&", 0.9), ("iljtfrI.,:;' |!()[]-/", 0.46))
_UPPER, _PLAIN, _FOREIGN, _SYMBOL = 0.87, 0.72, 1.25, 1.4
"""Widths in em that DejaVu Sans Bold, the widest font that a page is likely to be shown in, stays below."""


def escaped(value: object) -> Markup:
    """A value for HTML and SVG, between tags and in quoted attributes: no markup, no control or bidirectional
    characters.

    What is markup already passes as it is.

    Example:
        >>> print(escaped('<b title="x">' + chr(0x202e)), escaped(escaped("1 < 2")))
        &lt;b title=&#34;x&#34;&gt;\\u202e 1 &lt; 2
    """
    if isinstance(value, Markup):
        return value
    # XML 1.0 has no U+FFFE and no U+FFFF, which are neither control nor private.
    return escape(printable(str(value)).replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff"))


def text_width(text: str) -> float:
    """An upper bound of the width of one line of figure text, in px.

    Example:
        >>> round(text_width("88.0 %"))
        55
    """
    return FONT_SIZE * sum(map(_em, printable(text)))


def _em(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    # An accent adds no width.
    plain = unicodedata.normalize("NFD", character)[0]
    if not plain.isascii():
        return _SYMBOL if unicodedata.category(plain) == "So" else _FOREIGN
    return next(
        (width for characters, width in _WIDTHS if plain in characters), _UPPER if plain.isupper() else _PLAIN
    )


def elided(text: str, width: float) -> str:
    """The text in one line, cut with an ellipsis where it is wider than ``width`` px.

    Example:
        >>> elided("a name that goes on", 90)
        'a name t…'
    """
    line = " ".join(printable(text).split())
    if text_width(line) <= width:
        return line
    while line and text_width(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
