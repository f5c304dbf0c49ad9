"""``adapterpack compress``."""

from __future__ import annotations

from typing import Any

import click

import adapterpack

from ...artifacts import inspect
from ...errors import ConfigError
from ...hub import folder_of
from ...readable import show_value, size, things
from .. import common_options, load_pack, option, print_line, print_report


@click.command("compress")
@click.argument("packs", metavar="PACK...", nargs=-1)
@option(
    "-o --output --out out",
    "OUT",
    "The folder of the fleet, or with --member of the pack; it must not exist.",
)
@option(
    "--basis",
    "R",
    "The rank of the shared bases; by default the budgets decide.",
    type=click.IntRange(1, 65_536),
)
@option(
    "--clusters",
    "N",
    "The number of groups of packs, each with its own bases.",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
)
@option(
    "--error-budget",
    "E",
    "The relative error allowed. Without --basis: use the smallest rank that meets it; with it: packs "
    "that exceed it keep their own factors.",
    type=click.FloatRange(0, min_open=True),
)
@option(
    "--size-budget",
    "N",
    "The bytes allowed for all tensors; below 1, a share "
    "of the packs' own. Without --basis: use the largest rank that fits.",
    type=click.FloatRange(0, min_open=True),
)
@option(
    "--into",
    "FLEET",
    "Add the packs to this fleet, by projection onto its bases; without -o the fleet is replaced.",
)
@option("--member", "FLEET NAME", "Write one member of a fleet to OUT, as a pack.", nargs=2)
@common_options
def command(
    packs: tuple[str, ...],
    out: str | None,
    into: str | None,
    member: tuple[str, str] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compresses packs of one base into a fleet: shared bases at each site, and a small int8 core for each
    pack.

    \b
    Example:
      adapterpack compress packs/* -o fleet --basis 32
      adapterpack compress packs/* -o fleet --error-budget 0.1
      adapterpack compress packs/new --into fleet
      adapterpack compress --member fleet tickets -o packs/tickets
    """
    if out is None and (into is None or member is not None):
        raise ConfigError("no output is named", remedy="give -o OUT")
    if member is not None:
        if packs or into is not None:
            raise ConfigError("--member takes no packs", remedy="give --member FLEET NAME -o OUT alone")
        written = adapterpack.Fleet.load(folder_of(member[0])).pack(member[1]).write(str(out))
        if as_json:
            print_report(inspect(str(out)))
        else:
            print_line(f"wrote {written.name} to {out}")
        return
    loaded = [load_pack(pack) for pack in packs]
    fleet = adapterpack.compress(loaded, out=out, into=None if into is None else folder_of(into), **options)
    before = sum(value.nbytes for pack in loaded for value in pack.tensors.values())
    if as_json:
        print_report({**inspect(str(fleet.path)), "bytes_before": before})
        return
    members = fleet.manifest.members[-len(loaded) :]
    alone = [one.name for one in members if one.cluster is None]
    worst = max(members, key=lambda one: one.error)
    what = (
        f"{size(before)} became {size(fleet.nbytes)}"
        if into is None
        else f"the fleet has {size(fleet.nbytes)} now"
    )
    print_line(
        f"{things(len(loaded), 'pack')} in {fleet.path} on bases of rank {fleet.manifest.rank}: {what}"
    )
    mean = sum(one.error for one in members) / len(members)
    print_line(
        f"relative error of the changes: {show_value(mean)} on average, {show_value(worst.error)} at most "
        f"({worst.name})"
    )
    if alone:
        print_line(f"with factors of their own: {', '.join(alone[:5])}{', ...' if len(alone) > 5 else ''}")
