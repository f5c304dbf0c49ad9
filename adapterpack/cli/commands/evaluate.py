"""``adapterpack evaluate``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

import adapterpack

from ...hub import folder_of
from ...io import Json, output_file, refuse_existing
from ...offline.job import encode_row
from ...readable import things
from ...report.evaluation import evaluation_report, evaluation_table, seen_note
from .. import (
    batch_option,
    columns_option,
    common_options,
    device_of,
    device_options,
    html_option,
    load_adapter,
    open_page,
    option,
    packs_argument,
    print_line,
    print_report,
    print_table,
    sampling_options,
    sampling_parameters,
    show_steps,
)


@click.command("evaluate")
@click.argument("bundle", metavar="BUNDLE|BASE")
@packs_argument
@option("--data", "FILE", "Rows with known answers, in any form that training reads.", required=True)
@columns_option
@option(
    "--adapter adapters",
    "NAME",
    "An adapter of the bundle to measure; may be repeated. Default: the given packs, or all of the bundle.",
    multiple=True,
)
@option("--rows", "N", "Use the first N rows; of a folder N from all over it.", type=click.IntRange(min=1))
@click.option(
    "--on-bad-row",
    type=click.Choice(("fail", "skip")),
    default="fail",
    show_default=True,
    help="What to do with rows that cannot be read or run: end, or leave them out and say so.",
)
@option("--output out", "F.jsonl", "Write every row's answers and their measures to this new file.")
@html_option("the measures, a confusion map and the worst rows")
@device_options
@sampling_options
@batch_option
@option(
    "--max-length",
    "N",
    "The tokens at which texts are cut whose likelihood is measured.",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
)
@common_options
def command(
    *,
    bundle: str,
    packs: tuple[str, ...],
    data: str,
    columns: Json,
    adapters: tuple[str, ...],
    rows: int | None,
    on_bad_row: str,
    out: str | None,
    html: str | None,
    batch_size: int,
    max_length: int,
    as_json: bool,
    **parameters: Any,
) -> None:
    """Measures adapters on rows with known answers, and the base beside them, by the measures of the task.

    Each measure has its 95 % interval, by the bootstrap over rows.

    \b
    Example:
      adapterpack evaluate models/MiniLM packs/tickets --data tickets.test.jsonl
      adapterpack evaluate bundle --data orders.test.jsonl --adapter orders --html orders.html
      adapterpack evaluate bundle packs/new --data rows.csv --column text=message --output answers.jsonl
    """
    if out is not None:
        refuse_existing(Path(out), "--output")
    with open_page(html) as write_page, nullcontext() if out is None else output_file(out) as file:
        device = device_of(parameters)
        with show_steps() as say:
            found = adapterpack.evaluate(
                folder_of(bundle),
                [load_adapter(pack) for pack in packs],
                data={"path": data, "columns": columns} if columns else data,
                adapters=adapters or None,
                provider=device,
                batch_size=batch_size,
                rows=rows,
                max_length=max_length,
                on_bad_row=on_bad_row,
                progress=say,
                **sampling_parameters(parameters),
            )
        result = found.to_json()
        if file is not None:
            file.write_bytes(b"".join(map(encode_row, found.answers())))
        write_page(evaluation_report, result)
    if as_json:
        print_report(result, html=html)
        return
    print_line(f"{found.task}, {things(len(found.rows), 'row')} of {data}")
    print_table(*evaluation_table(result))
    for name in found.trained_on:
        print_line(seen_note(name))
    for name, reason in found.not_measured.items():
        print_line(f"not measured: {name}: {reason}")
    for reason in found.bad_rows:
        print_line(f"left out: {reason}")
    for path in filter(None, (out, html)):
        print_line(f"wrote {path}")
