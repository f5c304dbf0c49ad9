"""``adapterpack compose``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import adapterpack

from ..errors import ConfigError
from ..report.values import size
from .options import out_option, pack_at, pairs, shared, weight_option
from .output import emit, line, shown

_MAX_FILE = 1 << 18


@click.command("compose", short_help="packs combined into one pack")
@click.argument("packs", nargs=-1, required=True, metavar="PACK...")
@out_option("The folder of the new pack")
@click.option("--rule", default="linear", show_default=True, metavar="RULE", help='How; "adapterpack rules" lists what there is.')
@weight_option
@click.option("--param", "params", multiple=True, callback=pairs, metavar="K=V", help="A parameter of the rule; may be repeated.")
@click.option("--rank", type=int, metavar="R", help="Keep this rank at every site.")
@click.option("--energy", type=float, metavar="Q", help="Keep the smallest rank that holds this share of the squared singular values.")
@click.option("--tree", metavar="TREE", help='Instead of a rule, how the packs work together when they run: "sum(0.7*a, stack(b, c))", '
              'or a .json or .yaml file; "adapterpack methods" lists the nodes.')
@click.option("--seed", type=int, default=0, show_default=True, metavar="S", help="Of a rule's random choices, and of what a node that is "
              "trained begins with.")
@shared
def command(
    *, packs: tuple[str, ...], out: str, rule: str, weights: tuple[float, ...], params: Mapping[str, Any], rank: int | None,
    energy: float | None, tree: str | None, seed: int, as_json: bool,
) -> None:
    """One LoRA pack whose change is that of several packs, combined by a rule (adapterpack.rules); or, with a tree, one pack that holds
    them all and combines them when it runs.

    \b
    Example:
      adapterpack compose packs/a packs/b --weight 0.7 --weight 0.3 -o packs/both
      adapterpack compose packs/a packs/b --rank 8 -o packs/small
      adapterpack compose packs/a packs/b --rule ties --param density=0.3 --rank 16 -o packs/voted
      adapterpack compose packs/a packs/b packs/c --tree "arrow(a, b, c, top_k=2)" -o packs/routed
    """
    loaded = [pack_at(pack) for pack in packs]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        adapterpack.compose(loaded, rule=rule, weights=weights or None, params=params or None, rank=rank, energy=energy, out=out,
                            tree=None if tree is None else _tree(tree), seed=seed)
    for text in dict.fromkeys(str(each.message) for each in said):
        click.echo(f"warning: {text}", err=True)
    found = adapterpack.inspect(out)
    if as_json:
        emit({"command": "compose", **found})
        return
    lineage = found["lineage"]
    if tree is not None:
        names = ", ".join(parent["name"] for parent in lineage["parents"])
        line(f"composed {names} under {found['composition']} into {out}: {found['sites']} sites, {size(found['bytes'])}")
        return
    parents = ", ".join(f"{parent['weight']:g} of {parent['name']}" for parent in lineage["parents"])
    ranks = ", ".join(found["ranks"])
    line(f"composed {parents} by the rule {rule} into {out}: {found['sites']} sites of rank {ranks}, {size(found['bytes'])}")
    if "truncation" in lineage["params"]:
        line(f"the cut of the rank makes a relative error of {shown(lineage['params']['truncation']['total'])} in the change")


def _tree(text: str) -> Any:
    """The text itself, or what a file of that name holds."""
    path = Path(text)
    if path.suffix.lower() not in {".json", ".yaml", ".yml"}:
        return text
    if not path.is_file() or path.stat().st_size > _MAX_FILE:
        raise ConfigError("the file of the tree cannot be read", where=path, expected=f"a file of at most {_MAX_FILE} bytes",
                          found="no such file" if not path.is_file() else path.stat().st_size)
    import yaml  # noqa: PLC0415 - the listing of commands must not pay for it

    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError("the file of the tree cannot be read", where=path, found=str(error).partition("\n")[0]) from error
