"""The result of a demo run as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..errors import printable
from ..io.readable import MISSING, number, percent, seconds, size
from . import result as r
from .result import Result

Rows = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, column names, rows."""


def demo_tables(result: Result) -> list[Table]:
    """The tables of a demo run, of either variant: accuracy or quality, parity, sizes, times; those without
    figures are left out.

    Example:
        >>> [str(table.title) for table in demo_tables({"sizes": {"pack tickets": 1300000}})]
        ['Sizes']
    """
    return [_table(*rows) for build in TABLES if (rows := build(result))[2]]


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    # Text and not str: names may hold what rich would take for markup.
    table = Table(box=SIMPLE_HEAD, title=Text(title), title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(Text(printable(column)), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _accuracy(result: Result) -> Rows:
    tasks = r.accuracy(result)
    forms = list(dict.fromkeys(form for values in tasks.values() for form in values))
    return (
        "Accuracy",
        ["form", *tasks],
        [[r.spoken(form), *(percent(values.get(form)) for values in tasks.values())] for form in forms],
    )


def _quality(result: Result) -> Rows:
    rows = []
    for key, label in r.ANSWERS.items():
        values = r.part(result, key)
        if values:
            rows.append([label, percent(values.get("before")), percent(values.get("after"))])
    return "Without and with the adapter", ["measure", "without", "with"], rows


def _speed(result: Result) -> Rows:
    rows = [
        [r.spoken(key), f"{speed:.1f}"]
        for key in ("onnx", "torch")
        if (speed := number(r.part(result, "speed", key).get("tokens_per_second"))) is not None
    ]
    return "Speed", ["runtime", "tokens/s"], rows


def _parity(result: Result) -> Rows:
    columns, rows = r.parity(result)
    agreement = number(result.get("token_agreement"))
    if agreement is not None:
        blank = [MISSING] * (len(columns) - 1)
        columns, rows = (
            [*columns, "same tokens"],
            [[*row, MISSING] for row in rows] + [["generated text", *blank, percent(agreement)]],
        )
    return "Parity with PyTorch", columns, rows


def _served(result: Result) -> Rows:
    return "Over HTTP", *r.served(result)


def _sizes(result: Result) -> Rows:
    return (
        "Sizes",
        ["artifact", "on disk"],
        [[name, size(value)] for name, value in r.measured(r.part(result, "sizes")).items()],
    )


def _times(result: Result) -> Rows:
    times = r.measured(r.part(result, "timings"))
    rows = [[name.replace("_", " "), seconds(value)] for name, value in times.items()]
    return "Time", ["stage", "time"], [*rows, ["together", seconds(sum(times.values()))]] if rows else []


TABLES: tuple[Callable[[Result], Rows], ...] = (_quality, _accuracy, _parity, _speed, _served, _sizes, _times)
