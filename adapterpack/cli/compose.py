"""``adapterpack compose``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from ..composing.pipeline import compose
from ..composing.work import RankChosen
from ..hub.resolve import folder_of
from ..io.readable import shown, size, things
from ..pack.inspect import described
from .composing import measure_each, print_left_out, print_plan, say, write_recipes
from .options import pack_at, pairs, shared, values, weight_option
from .output import emit, line
from .progress import byte_bar
from .score import scored_by


@click.command("compose")
@click.argument("packs", nargs=-1, required=True, metavar="PACK...")
@click.option("-o", "--output", "out", metavar="OUT", help="The folder of the new pack; it must not exist.")
@click.option(
    "--rule",
    default="linear",
    show_default=True,
    metavar="RULE",
    shell_complete=values("adapterpack.composing.rules.rule:RULES"),
    help='How packs are combined; "adapterpack rules" lists the rules.',
)
@weight_option
@click.option(
    "--param",
    "params",
    multiple=True,
    callback=pairs,
    metavar="K=V",
    help="A parameter of the rule; may be repeated.",
)
@click.option(
    "--rank",
    type=int,
    metavar="R",
    help="Keep this rank at every site. Without it, rules whose result has no low "
    "rank, such as ties, keep the largest rank of the packs, and say what that loses.",
)
@click.option(
    "--energy",
    type=float,
    metavar="Q",
    help="Keep the smallest rank that holds this share of the squared singular values.",
)
@click.option(
    "--budget",
    type=float,
    metavar="N",
    help="How many numbers all factors may have together, distributed over sites for the "
    "least total error; below 1, a share of those of all packs.",
)
@click.option(
    "--whole",
    default="average",
    show_default=True,
    metavar="POLICY",
    help="Modules trained whole, such as heads: average; "
    "union, heads of different labels side by side; or pick:NAME, those of one pack.",
)
@click.option(
    "--statistics",
    multiple=True,
    metavar="FILE",
    help='What "adapterpack measure" wrote of each pack, in their order.',
)
@click.option(
    "--data",
    multiple=True,
    metavar="FILE",
    help="Instead, data to measure each pack on, in their order; needs --base. The "
    "statistics are kept next to OUT.",
)
@click.option(
    "--score",
    metavar="PROGRAM",
    help="For lorahub: a program that takes a pack's folder and prints a score last; higher is better.",
)
@click.option(
    "--base",
    metavar="BASE",
    help="The packs' base, for --data, and for methods whose change depends on it (DoRA, OFT, ...).",
)
@click.option(
    "--tree",
    metavar="TREE",
    help='Instead of a rule, how the packs work together when they run: "sum(0.7*a, stack(b, c))", '
    'or a .json or .yaml file; "adapterpack methods" lists the nodes.',
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar="S",
    help="The seed of a rule's random choices, and of the initial values of nodes that are trained.",
)
@click.option("--plan", "planned", is_flag=True, help="Only say what would be done, and at what cost.")
@click.option(
    "--recipe",
    metavar="FILE",
    help="Repeat a recipe, or what made a composed pack, byte for byte, with the same packs.",
)
@click.option("--write-recipe", metavar="FILE", help="Write the recipe of the new pack.")
@click.option(
    "--to-mergekit",
    metavar="FILE",
    help="Write the same merge as a configuration of mergekit, where it has the same formula.",
)
@shared
def command(
    *,
    packs: tuple[str, ...],
    out: str | None,
    rule: str,
    weights: tuple[float, ...],
    params: Mapping[str, Any],
    tree: str | None,
    statistics: tuple[str, ...],
    data: tuple[str, ...],
    score: str | None,
    base: str | None,
    planned: bool,
    recipe: str | None,
    write_recipe: str | None,
    to_mergekit: str | None,
    as_json: bool,
    **cuts: Any,
) -> None:
    """Combines packs by a rule into one LoRA pack; or, with a tree, into a pack that holds them all and
    combines them at run time.

    \b
    Example:
      adapterpack compose packs/a packs/b --weight 0.7 --weight 0.3 -o packs/both
      adapterpack compose packs/a packs/b --rank 8 -o packs/small
      adapterpack compose packs/a packs/b --rule ties --param density=0.3 --rank 16 --plan
      adapterpack compose packs/a packs/b --rule lorahub --score ./accuracy.sh -o packs/best
      adapterpack compose packs/a packs/b --recipe both.json -o packs/again
      adapterpack compose packs/a packs/b packs/c --tree "arrow(a, b, c, top_k=2)" -o packs/routed
    """
    loaded = [pack_at(pack) for pack in packs]
    options = {
        "rule": rule,
        "weights": weights or None,
        "params": params or None,
        **cuts,
        "base": None if base is None else folder_of(base),
    }
    if planned:
        print_plan(loaded, options, tree, as_json)
        return
    if out is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if data:
        statistics = measure_each(loaded, rule, data, statistics, base, out)
    with (
        warnings.catch_warnings(record=True) as caught,
        byte_bar("compose") if score is None else nullcontext() as progress,
    ):
        warnings.simplefilter("always", UserWarning)
        pack = compose(
            loaded,
            **options,
            out=out,
            statistics=statistics or None,
            tree=None if tree is None else _tree(tree),
            score=None if score is None else scored_by(score, say),
            recipe=recipe,
            progress=progress,
        )
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        say(f"warning: {text}")
    write_recipes(pack, packs, write_recipe, to_mergekit)
    summary = described(pack, out)
    for warning in caught:
        if isinstance(warning.message, RankChosen):
            summary["default_rank"] = {
                "rank": warning.message.rank,
                "energy_lost": warning.message.energy_lost,
            }
    if as_json:
        emit({"command": "compose", **summary})
        return
    lineage = summary["lineage"]
    if summary.get("composition"):
        names = ", ".join(parent["name"] for parent in lineage["parents"])
        line(
            f"composed {names} under {summary['composition']} into {out}: "
            f"{things(summary['sites'], 'site')}, {size(summary['bytes'])}"
        )
        return
    parents = ", ".join(f"{parent['weight']:g} of {parent['name']}" for parent in lineage["parents"])
    ranks = ", ".join(summary["ranks"])
    line(
        f"composed {parents} by the rule {lineage['operation']} into {out}: "
        f"{things(summary['sites'], 'site')} of rank {ranks}, {size(summary['bytes'])}"
    )
    if "truncation" in lineage["params"]:
        line(
            "the cut of the rank makes a relative error of "
            f"{shown(lineage['params']['truncation']['total'])} in the change"
        )
    print_left_out(lineage["params"])


def _tree(text: str) -> Any:
    """The text itself, or what a file of that name holds."""
    path = Path(text)
    if path.suffix.lower() not in {".json", ".yaml", ".yml"}:
        return text
    from ..io.plain_yaml import read  # noqa: PLC0415 - the listing of commands must not pay for it

    return read(path)
