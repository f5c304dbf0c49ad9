"""``adapterpack audit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import adapterpack

from ...auditing.screen import RATE
from ...hub import folder_of
from ...io import Json
from ...readable import percent
from ...report.audit import audit_report, screened_packs, worst_sites
from ...serving.adapters.adapter_source import packs_in
from .. import (
    common_options,
    flag,
    html_option,
    load_pack,
    open_page,
    option,
    print_line,
    print_report,
    print_table,
    show_bytes,
    weight_option,
)

_SITES = 10


@click.command("audit")
@click.argument("packs", nargs=-1, required=True, metavar="PACK...")
@weight_option
@option(
    "--base",
    "BASE",
    "The packs' base: adds the size of each change relative to its weight, and the loss of a "
    "merge; methods whose change depends on the weight (DoRA, OFT, ...) need it.",
)
@option(
    "--rank ranks", "R", "Report what a cut to this rank loses; may be repeated.", type=int, multiple=True
)
@option(
    "--dtype dtypes",
    "D",
    "Report what a merge in this dtype loses; may be repeated. Default: bf16 and fp16.",
    multiple=True,
)
@flag("--exact", "Measure sign conflicts and merges on all entries, not on a sample of rows.")
@option(
    "--screen",
    "CLEAN",
    "A folder of clean packs of your own, all of one recipe: says which PACK has a change unlike theirs, as "
    "hidden training may leave it. No proof in either direction.",
)
@option(
    "--false-alarms",
    "SHARE",
    "The share of clean packs that --screen may call unusual; 0.05 takes 19 clean packs, 0.02 takes 49.",
    type=float,
    default=RATE,
    show_default=True,
)
@html_option("pairs, spectra and sites")
@common_options
def command(
    *,
    packs: tuple[str, ...],
    weights: tuple[float, ...],
    base: str | None,
    ranks: tuple[int, ...],
    dtypes: tuple[str, ...],
    exact: bool,
    screen: str | None,
    false_alarms: float,
    html: str | None,
    as_json: bool,
) -> None:
    """Measures what packs do to the base and to each other, and gives a verdict: energy, rank, interference,
    shared subspaces, sign conflicts, and what merging or a lower rank would lose.

    \b
    Example:
      adapterpack audit packs/a packs/b
      adapterpack audit packs/a packs/b --base models/base --html audit.html
    """
    options: dict[str, Any] = {
        **({"ranks": ranks} if ranks else {}),
        **({"dtypes": dtypes} if dtypes else {}),
    }
    with open_page(html) as write_page:
        with show_bytes("audit") as progress:
            audit = adapterpack.audit(
                [load_pack(pack) for pack in packs],
                weights=weights or None,
                base=None if base is None else folder_of(base),
                exact=exact,
                clean=None if screen is None else [load_pack(str(path)) for path in packs_in(Path(screen))],
                false_alarms=false_alarms,
                progress=progress,
                **options,
            )
        result = audit.to_json()
        write_page(audit_report, result)
    if as_json:
        print_report(result, html=html)
        return
    _print(result)
    if html is not None:
        print_line(f"the page is {html}")


def _print(result: Json) -> None:
    verdict, total = result["verdict"], result["total"]
    if result["screen"] is not None:
        print_line(result["screen"]["limits"])
        print_table(*screened_packs(result))
    columns, rows = worst_sites(result, _SITES)
    if rows:
        print_table(
            columns,
            rows,
            f"{min(_SITES, len(result['sites']))} of {len(result['sites'])} sites, the worst first",
        )
    if total is not None:
        lost = ", ".join(f"{percent(loss)} at {rank}" for rank, loss in total["truncation"].items())
        if lost:
            print_line(f"cut to a rank, the change loses: {lost}")
    for module in result["whole"]:
        print_line(
            f"{module['path']} is trained whole in {', '.join(module['packs'])}: {module['treatment']}"
        )
    print_line(f"verdict: {verdict['summary']}")
    for reason in verdict["reasons"]:
        print_line(f"- {reason}")
    if verdict["rules"]:
        print_line(f"rules that fit: {', '.join(verdict['rules'])}")
