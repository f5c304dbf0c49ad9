"""``adapterpack compose``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

import adapterpack

from ..report.values import size
from .options import out_option, pack_at, pairs, shared, weight_option
from .output import emit, line, shown


@click.command("compose", short_help="packs combined into one pack")
@click.argument("packs", nargs=-1, required=True, metavar="PACK...")
@out_option("The folder of the new pack")
@click.option("--rule", default="linear", show_default=True, metavar="RULE", help='How; "adapterpack rules" lists what there is.')
@weight_option
@click.option("--param", "params", multiple=True, callback=pairs, metavar="K=V", help="A parameter of the rule; may be repeated.")
@click.option("--rank", type=int, metavar="R", help="Keep this rank at every site.")
@click.option("--energy", type=float, metavar="Q", help="Keep the smallest rank that holds this share of the squared singular values.")
@shared
def command(
    *, packs: tuple[str, ...], out: str, rule: str, weights: tuple[float, ...], params: Mapping[str, Any], rank: int | None,
    energy: float | None, as_json: bool,
) -> None:
    """One LoRA pack whose change is that of several packs, combined by a rule (adapterpack.rules).

    \b
    Example:
      adapterpack compose packs/a packs/b --weight 0.7 --weight 0.3 -o packs/both
      adapterpack compose packs/a packs/b --rank 8 -o packs/small
    """
    loaded = [pack_at(pack) for pack in packs]
    adapterpack.compose(loaded, rule=rule, weights=weights or None, params=params, rank=rank, energy=energy, out=out)
    found = adapterpack.inspect(out)
    if as_json:
        emit({"command": "compose", **found})
        return
    lineage = found["lineage"]
    parents = ", ".join(f"{parent['weight']:g} of {parent['name']}" for parent in lineage["parents"])
    ranks = ", ".join(found["ranks"])
    line(f"composed {parents} by the rule {rule} into {out}: {found['sites']} sites of rank {ranks}, {size(found['bytes'])}")
    if "truncation" in lineage["params"]:
        line(f"the cut of the rank makes a relative error of {shown(lineage['params']['truncation']['total'])} in the change")
