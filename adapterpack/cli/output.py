"""What commands print: JSON for programs; sentences, facts and tables for people, safe for a terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from ..errors import printable
from ..io.readable import shown
from ..io.strict_json import finite
from .streams import printed

_PLAIN_WIDTH = 160
_DIGEST = re.compile(r"\b([a-z0-9]+:[0-9a-f]{12})[0-9a-f]{52}\b")


def emit(value: Mapping[str, Any], compact: bool = False) -> None:
    """Prints one JSON object, ASCII only: names from strangers can do nothing to a terminal."""
    with printed():
        click.echo(json.dumps(finite(value), indent=None if compact else 2, allow_nan=False))


def shortened(value: Any) -> Any:
    """The value with the first 12 digits of every digest, which tell any two apart that a person looks at.

    Example:
        >>> shortened({"pack": ["sha256:" + "0123456789abcdef" * 4]})
        {'pack': ['sha256:0123456789ab...']}
    """
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(item) for item in value]
    return _DIGEST.sub(r"\1...", value) if isinstance(value, str) else value


def one_line(text: str) -> str:
    """The text on one line, control and bidirectional characters escaped."""
    return printable(text).replace("\n", "\\n")


def line(text: str) -> None:
    """Prints one line."""
    with printed():
        click.echo(one_line(text))


def facts(values: Mapping[str, Any]) -> None:
    """Prints names and values in two columns, and after them a table for every list of mappings."""
    tables = {name: value for name, value in values.items() if _is_records(value)}
    plain = {name.replace("_", " "): value for name, value in values.items() if name not in tables}
    width = max(map(len, plain), default=0)
    for name, value in plain.items():
        line(f"{name.ljust(width)}  {shown(value)}")
    for name, records in tables.items():
        table(list(records[0]), [list(record.values()) for record in records], name.replace("_", " "))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Prints a table; on anything but a terminal it is wide, so that nothing is folded."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - the listing of commands must not pay for it
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    drawn = Table(
        box=SIMPLE_HEAD,
        title=None if title is None else Text(one_line(title)),
        title_justify="left",
        pad_edge=False,
    )
    for column in columns:
        drawn.add_column(Text(one_line(column)), overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(one_line(shown(value))) for value in row))
    draw(drawn)


def draw(table: Any) -> None:
    """Prints a table that rich has laid out."""
    from rich.console import Console  # noqa: PLC0415 - as above

    with printed():
        Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False).print(table)


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
