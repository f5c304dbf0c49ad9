"""``adapterpack doctor``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

import adapterpack

from ...errors import EXIT_FAILED
from ...readable import size, things
from .. import (
    common_options,
    flag,
    guard_stdout,
    print_facts,
    print_line,
    print_report,
    print_table,
    show_steps,
)

_FOR_PROGRAMS = {"bytes", "missing"}
"""Columns that only the JSON has."""
_COLOURS = {"good": "green", "note": "yellow", "broken": "red"}


@click.command("doctor")
@flag("--hub", "Also check that the hub (HF_ENDPOINT) can be reached; nothing else uses the network.")
@flag("--clean", "Empty adapterpack's caches, after asking, instead of checking; nothing else is touched.")
@flag("--yes", "With --clean: do not ask.")
@common_options
@click.pass_context
def command(ctx: click.Context, /, *, hub: bool, clean: bool, yes: bool, as_json: bool) -> None:
    """Checks this installation of adapterpack: versions, providers, libraries, kernels, extras, caches, disk.

    Every provider of ONNX Runtime is started on a small graph, in a process of its own. Exit code 0: usable;
    1: something is broken, and the remedy stands below it.

    \b
    Example:
      adapterpack doctor
      adapterpack doctor --hub --json
      adapterpack doctor --clean
    """
    if clean:
        if as_json and not yes:
            raise click.UsageError("--json cannot ask: give --yes too.")
        _clean(yes, as_json)
        return
    if yes:
        raise click.UsageError("--yes goes with --clean.")
    with show_steps() as say:
        diagnosis = adapterpack.doctor(hub=hub, progress=lambda title: say(f"look at: {title}"))
    if as_json:
        print_report(diagnosis.to_json())
    else:
        for name, looked in diagnosis.found.items():
            with guard_stdout():
                click.echo(
                    f"{click.style(diagnosis.titles[name], bold=True)}: "
                    f"{click.style(looked.state, fg=_COLOURS[looked.state])}"
                )
            _print(looked.facts)
            for problem in looked.problems:
                print_line(
                    f"{'broken' if problem.broken else 'note'}: {problem.what}. To fix it: {problem.remedy}."
                )
            print_line("")
        broken = [
            diagnosis.titles[name] for name, looked in diagnosis.found.items() if looked.state == "broken"
        ]
        print_line(f"broken: {', '.join(broken)}" if broken else "adapterpack is usable")
    if not diagnosis.usable:
        ctx.exit(EXIT_FAILED)


def _print(found: Mapping[str, Any]) -> None:
    """Prints facts in two columns, and each list of rows as a table."""
    tables = [
        value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    print_facts({key: value for key, value in found.items() if value not in tables})
    for rows in tables:
        columns = [name for name in rows[0] if name not in _FOR_PROGRAMS]
        print_table(
            [name.replace("_", " ") for name in columns], [[row[name] for name in columns] for row in rows]
        )


def _clean(yes: bool, as_json: bool) -> None:
    from ...diagnosing import caches  # noqa: PLC0415 - the help needs none of it

    kept, _ = caches.find_caches()
    full = [one for one in kept if one.entries]
    if not as_json:
        for one in full:
            print_line(f"{one.path}: {size(one.bytes)} in {things(one.files, 'file')}, {one.kind.holds}")
        if not full:
            print_line("the caches are empty")
            return
        if not yes:
            click.confirm("Remove all of this? What is needed again is fetched or computed again", abort=True)
    cleaned = caches.clean(full)
    if as_json:
        print_report(
            {
                "cleaned": [str(path) for path in cleaned.folders],
                "bytes": cleaned.bytes,
                "left": [str(path) for path in cleaned.left],
            }
        )
        return
    print_line(f"removed {size(cleaned.bytes)}")
    for path in cleaned.left:
        print_line(f"left {path}: it may still be arriving")
