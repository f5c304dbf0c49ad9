"""Prints the output of commands: JSON for programs; sentences, facts and tables for people, safe for a
terminal.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from ..errors import printable, storage_errors
from ..io import finite
from ..readable import show_value

_PLAIN_WIDTH = 160
_DIGEST = re.compile(r"\b([a-z0-9]+:[0-9a-f]{12})[0-9a-f]{52}\b")


def print_json(value: Mapping[str, Any], compact: bool = False, html: str | None = None) -> None:
    """Prints one JSON object, ASCII only, so that untrusted names cannot control a terminal; ``html`` is the
    page that was written, too.
    """
    if html is not None:
        value = {**value, "html": str(Path(html))}
    with guard_stdout():
        click.echo(json.dumps(finite(value), indent=None if compact else 2, allow_nan=False))


def print_report(value: Mapping[str, Any], compact: bool = False, html: str | None = None) -> None:
    """Prints what a command found as one JSON object, which says first which command it was."""
    ctx = click.get_current_context()
    command = ctx.command_path.removeprefix(f"{ctx.find_root().command_path} ")
    print_json({"command": command, **value}, compact, html)


def shorten_digests(value: Any) -> Any:
    """Shortens every digest to 12 digits, which are enough for people to tell digests apart.

    Example:
        >>> shorten_digests({"pack": ["sha256:" + "0123456789abcdef" * 4]})
        {'pack': ['sha256:0123456789ab...']}
    """
    if isinstance(value, Mapping):
        return {key: shorten_digests(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shorten_digests(item) for item in value]
    return _DIGEST.sub(r"\1...", value) if isinstance(value, str) else value


def escape_line(text: str) -> str:
    """Returns the text on one line, with control and bidirectional characters escaped."""
    return printable(text).replace("\n", "\\n")


def print_line(text: str) -> None:
    """Prints one line."""
    with guard_stdout():
        click.echo(escape_line(text))


def print_facts(values: Mapping[str, Any]) -> None:
    """Prints names and values in two columns, and after them a table for every list of mappings."""
    tables = {name: value for name, value in values.items() if _is_records(value)}
    plain = {name.replace("_", " "): value for name, value in values.items() if name not in tables}
    width = max(map(len, plain), default=0)
    for name, value in plain.items():
        print_line(f"{name.ljust(width)}  {show_value(value)}")
    for name, records in tables.items():
        print_table(list(records[0]), [list(record.values()) for record in records], name.replace("_", " "))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Prints a table; on anything but a terminal it is wide enough not to wrap."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - the listing of commands must not pay for it
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    drawn = Table(
        box=SIMPLE_HEAD,
        title=None if title is None else Text(escape_line(title)),
        title_justify="left",
        pad_edge=False,
    )
    for column in columns:
        drawn.add_column(Text(escape_line(column)), overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(escape_line(show_value(value))) for value in row))
    print_rich(drawn)


def print_rich(table: Any) -> None:
    """Prints a table that rich has laid out."""
    from rich.console import Console  # noqa: PLC0415 - as above

    with guard_stdout():
        Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False).print(table)


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def open_missing() -> None:
    """Opens the standard streams that the caller has closed on the null device: otherwise the next opened
    file would get their descriptor, and receive the output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue
            # open takes the lowest free descriptor, which is this stream's
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", errors="replace"))


@contextmanager
def guard_stdout() -> Iterator[None]:
    """Makes errors of printing in the block name standard output, and discards output after such an error. A
    closed pipe is not an error.

    Raises:
        StorageError: stdout cannot be written, for instance because it is a file on a full disk.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        with suppress(OSError, ValueError):  # stdout is not a file, as in tests
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())  # discards the buffered output too
            os.close(nowhere)
        with storage_errors("standard output"):
            raise
