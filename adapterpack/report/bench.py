"""Renders the table and the page of ``adapterpack bench``."""

from __future__ import annotations

from ..io import Json
from ..readable import size, things
from .page import Table, render


def bench_table(result: Json) -> Table:
    """Returns column names and rows: one row for each load.

    Example:
        >>> line = {"rows": 1, "adapters": "base", "first_token": 0.02, "prompt_speed": 6400}
        >>> bench_table({"lines": [{**line, "speed": 50, "step": 0.02}], "floor": 0.01})[1]
        [['1', 'base', '20 ms', '6,400', '50', '20 ms', '2']]
    """
    columns = ["rows", "adapters", "first token", "prompt tokens/s", "tokens/s", "step", "step / floor"]
    if not _decodes(result):
        columns = ["rows", "adapters", "answer", "tokens/s"]
    return columns, [_line(line, result["floor"]) for line in result["lines"]]


def _decodes(result: Json) -> bool:
    return any(line["speed"] is not None for line in result["lines"])


def _line(line: Json, floor: float) -> list[str]:
    step = line["step"]
    read = f"{line['prompt_speed']:,.0f}"
    cells = [str(line["rows"]), line["adapters"], _milliseconds(line["first_token"]), read]
    return (
        cells
        if step is None
        else [*cells, f"{line['speed']:,.0f}", _milliseconds(step), _figure(step / floor)]
    )


def _milliseconds(seconds: float) -> str:
    return f"{_figure(1e3 * seconds)} ms"


def _figure(number: float) -> str:
    """Returns a number with three digits, or all that stand before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def bench_facts(result: Json) -> str:
    """Returns what was run, and the floor, in a sentence each."""
    new = f", {result['tokens']} new ones" if _decodes(result) else ""
    memory = "" if result["memory"] is None else f" The process had at most {size(result['memory'])}."
    return (
        f"Prompts of {things(result['prompt'], 'token')}{new}. "
        f"The floor is the time in which {size(result['weights'])} of weights pass through memory at "
        f"{size(round(result['bandwidth']))}/s: {_milliseconds(result['floor'])}.{memory}"
    )


def bench_report(result: Json, name: str) -> str:
    """Writes what ``Bench.to_json()`` gives as one self-contained HTML page."""
    return render(
        "bench.html.jinja", title=f"Speed of {name}", about=bench_facts(result), table=bench_table(result)
    )
