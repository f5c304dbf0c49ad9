"""``adapterpack demo``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

import adapterpack

from .options import shared
from .output import emit, facts, line, size, table
from .progress import steps

SECTIONS = ("accuracy", "exact_match", "parity", "speed", "compose")
"""What is shown as tables, where the demo has measured it."""


@click.command("demo", short_help="the whole line on a real model")
@click.option("--causal-lm", is_flag=True, help="A small language model in place of an encoder.")
@click.option("--model", metavar="BASE", help="A checkpoint folder or hub id in place of the demo's own model.")
@click.option("-o", "--output", "out", metavar="DIR", help="The folder for everything that is made; it must not exist.")
@shared
def command(causal_lm: bool, model: str | None, out: str | None, as_json: bool) -> None:
    """Runs the whole line on a real model and returns what was measured: accuracy, parity, sizes, times.

    Trains, packs, validates, composes, merges, quantizes, exports and runs a mixed batch; everything it makes lies in DIR, with a
    report.html.

    \b
    Example:
      adapterpack demo
      adapterpack demo --causal-lm -o demo-lm
    """
    with steps() as say:
        result = adapterpack.demo(out, causal_lm=causal_lm, model=model, progress=say)
    if as_json:
        emit({**result, "command": "demo"})
        return
    for name in SECTIONS:
        if isinstance(result.get(name), Mapping):
            _section(name.replace("_", " "), result[name])
        elif name in result:
            facts({name: result[name]})
    table(["file or folder", "size"], [[name, size(count)] for name, count in result["sizes"].items()], "sizes")
    table(["stage", "seconds"], result["timings"].items(), "times")
    facts({key: result[key] for key in ("mixed_batch_equal", "token_agreement") if key in result})
    line(f"report: {result['report']}")


def _section(title: str, section: Mapping[str, Any]) -> None:
    rows = list(_leaves(section))
    columns = list(dict.fromkeys(key for _, leaf in rows for key in leaf))
    labelled = any(label for label, _ in rows)
    cells = [[*([label] if labelled else []), *(leaf.get(column, "") for column in columns)] for label, leaf in rows]
    table([*([""] if labelled else []), *columns], cells, title)


def _leaves(values: Mapping[str, Any], label: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The innermost mappings, each with the keys that lead to it; the single values of a level are one of its own."""
    single = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    if single:
        yield label, single
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{label} {key}".strip())
