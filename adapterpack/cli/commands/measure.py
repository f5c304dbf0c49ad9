"""``adapterpack measure``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import adapterpack

from ...hub import folder_of
from ...manifest import FILE_NAME
from ...readable import size, things
from .. import common_options, load_pack, option, print_line, print_report, show_steps


@click.command("measure")
@click.argument("base")
@click.argument("pack")
@option("--data", "FILE", "A file of rows, in any form that training reads.", required=True)
@click.option(
    "--kind",
    type=click.Choice(["moment", "fisher", "texts"]),
    default="moment",
    show_default=True,
    help="moment: second moments of every site's inputs, for the rule regmean; needs no labels. fisher: "
    "squared gradients of the loss, for the rule fisher. texts: write the pack anew as FILE, with a profile "
    "of the words in its rows, by which a server chooses for the model auto; who has the pack can read off "
    "it which words were frequent.",
)
@option("--rows", "N", "The number of rows to use.", type=int, default=256, show_default=True)
@option("--max-length", "N", "The most tokens of a row.", type=int, default=512, show_default=True)
@option("-o --output out", "FILE", "The file to write; it is replaced if it exists.", required=True)
@common_options
def command(*, base: str, pack: str, data: str, out: str, as_json: bool, **options: Any) -> None:
    """Runs the base with one adapter over data, and writes statistics of every site of the adapter.

    \b
    Example:
      adapterpack measure MiniLM packs/a --data a.jsonl -o a.moments
      adapterpack measure MiniLM packs/b --data b.jsonl --kind fisher -o b.fisher
      adapterpack measure MiniLM packs/c --data c.jsonl --kind texts -o packs/c
    """
    with show_steps() as step:
        step("load the base and the adapter")
        tenths = 0

        def say(done: int, total: int) -> None:
            nonlocal tenths
            if 10 * done // total > tenths:
                tenths = 10 * done // total
                step(f"measure: {done} of {total} rows")

        statistics = adapterpack.measure(
            folder_of(base), load_pack(pack), data, out=out, progress=say, **options
        )
    place = Path(out)
    written = (place / FILE_NAME if place.is_dir() else place).stat().st_size
    if as_json:
        print_report(
            {
                "kind": statistics.kind,
                "pack": statistics.pack,
                "rows": statistics.rows,
                "sites": len(statistics.matrices),
                "bytes": written,
                "digest": statistics.digest,
            }
        )
        return
    if options["kind"] == "texts":
        print_line(f"wrote {out}, {statistics.digest}: {pack} with a profile of {statistics.rows} texts")
        return
    print_line(
        f"measured {pack} on {things(statistics.rows, 'row')} of {data}: {statistics.kind} of "
        f"{things(len(statistics.matrices), 'site')} into {out}, {size(written)}"
    )
