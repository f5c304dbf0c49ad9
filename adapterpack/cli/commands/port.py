"""``adapterpack port``."""

from __future__ import annotations

from pathlib import Path

import click

import adapterpack

from ...hub import folder_of
from ...io import refuse_existing
from ...pack import describe
from ...readable import show_value, things
from ...report.evaluation import evaluation_table
from .. import (
    common_options,
    load_pack,
    option,
    out_option,
    print_line,
    print_report,
    print_table,
    show_bytes,
    show_steps,
)


@click.command("port")
@click.argument("pack")
@click.argument("old")
@click.argument("new")
@out_option("The folder of the new pack")
@option(
    "--rank", "R", "The largest rank that any site keeps; needed for changes without a low rank.", type=int
)
@option("--data", "FILE", "Rows as evaluate reads them: measure the pack on OLD, and the new one on NEW.")
@common_options
def command(
    *, pack: str, old: str, new: str, out: str, rank: int | None, data: str | None, as_json: bool
) -> None:
    """Carries a pack from its base OLD to NEW, which was made from OLD: trained further, or without some
    layers or hidden units.

    Needs no data and trains nothing. The distance of the weights says what the result can be worth.

    \b
    Example:
      adapterpack port packs/tickets models/base models/base-v2 -o packs/tickets-v2
      adapterpack port packs/tickets models/base models/base-v2 -o packs/v2 --data tickets.test.jsonl
    """
    refuse_existing(out)
    bases = [folder_of(old), folder_of(new)]
    packs = [load_pack(pack)]
    with show_bytes("port") as progress:
        packs.append(adapterpack.port(packs[0], *bases, rank=rank, name=Path(out).name, progress=progress))
    results = []
    if data is not None:
        with show_steps() as say:
            for base, one in zip(bases, packs, strict=True):
                results.append(adapterpack.evaluate(base, [one], data=data, progress=say).to_json())
    summary = describe(packs[1].write(out), out)
    if as_json:
        print_report({**summary, "evaluations": results})
        return
    found = summary["lineage"]["params"]
    farthest = max(site["distance"] for site in found["sites"].values())
    print_line(
        f"ported {pack} to {new} in {out}: {things(summary['sites'], 'site')}, {len(found['missing'])} left "
        f"out; {found['verdict']}: the weights are up to {show_value(farthest)} away from the old ones"
    )
    for where, result in zip((old, new), results, strict=False):
        print_line(f"on {where}:")
        print_table(*evaluation_table(result))
