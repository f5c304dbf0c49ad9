"""``adapterpack demo``."""

from __future__ import annotations

import click

import adapterpack

from ...demos import load_stages, prepare
from .. import (
    common_options,
    flag,
    option,
    print_facts,
    print_json,
    print_line,
    print_report,
    print_table,
    show_steps,
)


@click.command("demo")
@flag("--causal-lm", "Use a small language model instead of an encoder.")
@option("--model", "BASE", "A checkpoint folder or a hub id, instead of the demo's own model.")
@flag(
    "--prepare only_models",
    "Put the demo's models into DIR (default: models), as bases for the guide and the examples, "
    "and run nothing.",
)
@option("-o --output out", "DIR", "The folder for everything that is made; it must not exist.")
@common_options
def command(causal_lm: bool, model: str | None, only_models: bool, out: str | None, as_json: bool) -> None:
    """Runs every stage on a small real model and reports what it measured: accuracy, parity, sizes, times.

    It trains, packs, validates, composes, merges, quantizes, exports and runs a mixed batch. All results are
    in DIR, with a report.html.

    \b
    Example:
      adapterpack demo
      adapterpack demo --causal-lm -o demo-lm
      adapterpack demo --prepare
    """
    if only_models:
        if causal_lm or model is not None:
            raise click.UsageError(
                "--prepare fetches the demo's own models, and takes no other option than -o."
            )
        with show_steps() as say:
            bases = prepare(out or "models", say)
        if as_json:
            print_report({"bases": [str(base) for base in bases]})
        for base in () if as_json else bases:
            print_line(f"{base} is ready")
        return
    with show_steps() as say:
        result = adapterpack.demo(out, causal_lm=causal_lm, model=model, progress=say)
    if as_json:
        print_json({**result, "command": "demo"})
        return
    tables = load_stages("report").demo_tables(result)

    for title, (columns, rows) in tables.items():
        print_table(columns, rows, title)
    print_facts({key: result[key] for key in ("mixed_batch_equal", "token_agreement") if key in result})
    print_line(f"report: {result['report']}")
