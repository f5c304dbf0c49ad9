"""One self-contained HTML file from a list of sections: no script, no external resource, every text escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from math import ceil
from typing import Any, NamedTuple

from .style import style_sheet
from .svg import Svg
from .text import escaped


class Heading(NamedTuple):
    """Starts a part of the page."""

    text: str


class Paragraph(NamedTuple):
    """Running text."""

    text: str


class Card(NamedTuple):
    """One key figure: what it is, its value, and half a sentence that puts it in place."""

    label: str
    value: str
    note: str = ""


class KeyFigures(NamedTuple):
    """The figures to see first."""

    cards: Sequence[Card]


class Table(NamedTuple):
    """Rows under column names; ``numbers`` are the columns (from 0) that are set flush right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    caption: str = ""


class Figure(NamedTuple):
    """A chart of :mod:`adapterpack.report.svg` with its caption."""

    svg: Svg
    caption: str = ""


class Record(NamedTuple):
    """Names and texts under each other, for texts too long for a table; line breaks are kept."""

    fields: Sequence[tuple[str, str]]


class Code(NamedTuple):
    """Lines to type."""

    text: str


Section = Heading | Paragraph | KeyFigures | Table | Figure | Record | Code


def page(title: str, sections: Sequence[Section], footer: str = "") -> str:
    """A whole HTML document in reading order; readable at 400 px and at 1200 px, in light and dark, and on paper.

    Example:
        >>> text = page("A < B", [Heading("One"), Paragraph("1 & 2")])
        >>> "<h1>A &lt; B</h1>" in text, "<p>1 &amp; 2</p>" in text
        (True, True)
    """
    body = "\n".join(_RENDER[type(section)](section) for section in sections)
    foot = f"\n<footer>{escaped(footer)}</footer>" if footer else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escaped(title)}</title>
<style>
{style_sheet()}</style>
</head>
<body>
<main>
<h1>{escaped(title)}</h1>
{body}{foot}
</main>
</body>
</html>
"""


def _tag(name: str, inner: str) -> str:
    return f"<{name}>{inner}</{name}>"


def _cards(figures: KeyFigures) -> str:
    items = (_tag("li", _tag("span", escaped(label)) + _tag("strong", escaped(value)) + (_tag("span", escaped(note)) if note else ""))
             for label, value, note in figures.cards)
    # Up to five in one row, more in two even rows; the style sheet makes two columns of them on a narrow screen.
    columns = len(figures.cards) if len(figures.cards) <= 5 else ceil(len(figures.cards) / 2)
    return _tag_list(f'<ul class="cards" style="--columns:{columns}">', items, "</ul>")


def _table(table: Table) -> str:
    kinds = [' class="number"' if column in table.numbers else "" for column in range(len(table.columns))]
    head = "".join(f'<th scope="col"{kind}>{escaped(name)}</th>' for kind, name in zip(kinds, table.columns, strict=True))
    rows = (_tag("tr", "".join(f"<td{kind}>{escaped(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))) for row in table.rows)
    caption = _tag("caption", escaped(table.caption)) if table.caption else ""
    # The keyboard must reach what scrolls sideways on a narrow screen.
    open_tags = f'<div class="scroll" tabindex="0">\n<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>'
    return _tag_list(open_tags, rows, "</tbody>\n</table>\n</div>")


def _figure(figure: Figure) -> str:
    return _tag("figure", figure.svg + (_tag("figcaption", escaped(figure.caption)) if figure.caption else ""))


def _record(record: Record) -> str:
    return _tag("dl", "".join(_tag("dt", escaped(name)) + _tag("dd", escaped(text)) for name, text in record.fields))


def _tag_list(start: str, items: Iterable[str], end: str) -> str:
    return "\n".join(chain([start], items, [end]))


_RENDER: dict[type, Callable[[Any], str]] = {
    Heading: lambda heading: _tag("h2", escaped(heading.text)),
    Paragraph: lambda paragraph: _tag("p", escaped(paragraph.text)),
    KeyFigures: _cards,
    Table: _table,
    Figure: _figure,
    Record: _record,
    Code: lambda code: _tag("pre", _tag("code", escaped(code.text))),
}
