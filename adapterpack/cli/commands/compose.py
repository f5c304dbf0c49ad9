"""``adapterpack compose``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

import adapterpack

from ...base import Checkpoint
from ...composing.full_models import merge_models
from ...composing.mergekit import write as write_mergekit
from ...composing.mergekit_file import MergekitFile, layers_of
from ...composing.mergekit_file import read as read_mergekit
from ...composing.pipeline import compose
from ...composing.plan import plan
from ...composing.recipe import recipe_of
from ...composing.rules.rule import RULES
from ...composing.steps import RankChosen
from ...errors import ConfigError
from ...hub import folder_at_hand, folder_of
from ...pack import describe
from ...readable import show_value, size, things
from .. import (
    common_options,
    flag,
    load_pack,
    log_message,
    option,
    parse_pairs,
    print_line,
    print_report,
    print_table,
    show_bytes,
    show_steps,
    suggest,
    weight_option,
)
from ..score import score_with


@click.command("compose")
@click.argument("packs", nargs=-1, required=True, metavar="PACK...")
@option("-o --output out", "OUT", "The folder of the new pack; it must not exist.")
@option(
    "--rule",
    "RULE",
    'How packs are combined; "adapterpack rules" lists the rules.',
    default="linear",
    show_default=True,
    shell_complete=suggest("adapterpack.composing.rules.rule:RULES"),
)
@weight_option
@option(
    "--param params", "K=V", "A parameter of the rule; may be repeated.", multiple=True, callback=parse_pairs
)
@option(
    "--rank",
    "R",
    "Keep this rank at every site. Without it, rules whose result has no low "
    "rank, such as ties, keep the largest rank of the packs, and say what that loses.",
    type=int,
)
@option(
    "--energy",
    "Q",
    "Keep the smallest rank that holds this share of the squared singular values.",
    type=float,
)
@option(
    "--budget",
    "N",
    "How many numbers all factors may have together, distributed over sites for the "
    "least total error; below 1, a share of those of all packs.",
    type=float,
)
@option(
    "--whole",
    "POLICY",
    "Modules trained whole, such as heads: average; "
    "union, heads of different labels side by side; or pick:NAME, those of one pack.",
    default="average",
    show_default=True,
)
@option(
    "--statistics", "FILE", 'What "adapterpack measure" wrote of each pack, in their order.', multiple=True
)
@option(
    "--data",
    "FILE",
    "Instead, data to measure each pack on, in their order; needs --base. The "
    "statistics are kept next to OUT.",
    multiple=True,
)
@option(
    "--score",
    "PROGRAM",
    "For lorahub: a program that takes a pack's folder and prints a score last; higher is better.",
)
@option(
    "--base",
    "BASE",
    "The packs' base, for --data, and for methods whose change depends on it (DoRA, OFT, ...).",
)
@option(
    "--tree",
    "TREE",
    'Instead of a rule, how the packs work together when they run: "sum(0.7*a, stack(b, c))", '
    'or a .json or .yaml file; "adapterpack methods" lists the nodes.',
)
@option(
    "--seed",
    "S",
    "The seed of a rule's random choices, and of the initial values of nodes that are trained.",
    type=int,
    default=0,
    show_default=True,
)
@flag("--plan planned", "Only say what would be done and what it would cost.")
@option(
    "--recipe", "FILE", "Repeat a recipe, or what made a composed pack, byte for byte, with the same packs."
)
@option("--write-recipe", "FILE", "Write the recipe of the new pack.")
@option(
    "--to-mergekit",
    "FILE",
    "Write the same merge as a configuration of mergekit, where it has the same formula.",
)
@common_options
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

    A single PACK that is a .yaml or .yml file is a configuration of mergekit: of adapters it gives a pack, of
    full models a merged checkpoint.

    \b
    Example:
      adapterpack compose packs/a packs/b --weight 0.7 --weight 0.3 -o packs/both
      adapterpack compose packs/a packs/b --rank 8 -o packs/small
      adapterpack compose packs/a packs/b --rule ties --param density=0.3 --rank 16 --plan
      adapterpack compose packs/a packs/b --rule lorahub --score ./accuracy.sh -o packs/best
      adapterpack compose packs/a packs/b --recipe both.json -o packs/again
      adapterpack compose packs/a packs/b packs/c --tree "arrow(a, b, c, top_k=2)" -o packs/routed
      adapterpack compose merge.yaml -o packs/merged
    """
    options: dict[str, Any] = {"rule": rule, "weights": weights or None, "params": params or None}
    others = (tree, recipe, score, *data, *statistics)
    file = _mergekit_file(packs, [*others, *(() if rule == "linear" else (rule,)), *weights, *params])
    if file is not None and not file.of_adapters:
        merge_checkpoints(file, out, cuts["seed"], planned, as_json)
        return
    if file is not None:
        packs = tuple(file.packs)
    loaded = [load_pack(pack) for pack in packs]
    if file is not None:
        options = file.options(loaded, _layers(file, loaded))
    options |= {**cuts, "base": None if base is None else folder_of(base)}
    if planned:
        print_plan(loaded, options, tree, as_json)
        return
    if out is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    if data:
        statistics = measure_packs(loaded, rule, data, statistics, base, out)
    with (
        warnings.catch_warnings(record=True) as caught,
        show_bytes("compose") if score is None else nullcontext() as progress,
    ):
        warnings.simplefilter("always", UserWarning)
        pack = compose(
            loaded,
            **options,
            out=out,
            statistics=statistics or None,
            tree=None if tree is None else _read_tree(tree),
            score=None if score is None else score_with(score, log_message),
            recipe=recipe,
            progress=progress,
        )
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        log_message(f"warning: {text}")
    write_recipes(pack, packs, write_recipe, to_mergekit)
    summary = describe(pack, out)
    for warning in caught:
        if isinstance(warning.message, RankChosen):
            summary["default_rank"] = {
                "rank": warning.message.rank,
                "energy_lost": warning.message.energy_lost,
            }
    if as_json:
        print_report(summary)
        return
    lineage = summary["lineage"]
    if summary.get("composition"):
        names = ", ".join(parent["name"] for parent in lineage["parents"])
        print_line(
            f"composed {names} under {summary['composition']} into {out}: "
            f"{things(summary['sites'], 'site')}, {size(summary['bytes'])}"
        )
        return
    parents = ", ".join(f"{parent['weight']:g} of {parent['name']}" for parent in lineage["parents"])
    ranks = ", ".join(summary["ranks"])
    print_line(
        f"composed {parents} by the rule {lineage['operation']} into {out}: "
        f"{things(summary['sites'], 'site')} of rank {ranks}, {size(summary['bytes'])}"
    )
    if "truncation" in lineage["params"]:
        print_line(
            "the cut of the rank makes a relative error of "
            f"{show_value(lineage['params']['truncation']['total'])} in the change"
        )
    print_left_out(lineage["params"])


def _mergekit_file(packs: tuple[str, ...], others: list[Any]) -> MergekitFile | None:
    """Returns the configuration of mergekit that is named in place of packs, or None; ``others`` are options
    that such a file stands for.
    """
    if len(packs) != 1 or Path(packs[0]).suffix.lower() not in {".yaml", ".yml"}:
        return None
    if any(other is not None for other in others):
        raise click.UsageError("A configuration of mergekit says itself how its models are combined.")
    file = read_mergekit(Path(packs[0]))
    for note in file.notes:
        log_message(f"note: {note}")
    return file


def _layers(file: MergekitFile, packs: list[Any]) -> dict[str, int]:
    """Returns how many layers the base of a mergekit file has, by the path before their numbers."""
    folder = None if file.base_name is None else folder_at_hand(file.base_name)
    if folder is not None:
        return layers_of(Checkpoint(folder).stored)
    dims = next((pack.manifest.base.dims for pack in packs if pack.manifest.base.dims is not None), None)
    if dims is None or dims.layers is None:
        return {}
    paths = (f"{group.path}." for pack in packs for group in pack.manifest.adapter_groups)
    return dict.fromkeys(layers_of(paths), dims.layers)


def merge_checkpoints(file: MergekitFile, out: str | None, seed: int, planned: bool, as_json: bool) -> None:
    """Merges the full models of a mergekit file, and says what was written."""
    if planned or out is None:
        raise click.UsageError(
            "There is no plan of a merge of full models: leave --plan out, and name the new folder with -o."
        )
    named = dict.fromkeys(model.name for model in (file.donor, *file.models, *filter(None, (file.base,))))
    folders = {name: folder_of(name) for name in named}
    with show_bytes("compose") as progress:
        done = merge_models(file, folders, out, seed=seed, progress=progress)
    if as_json:
        print_report(done._asdict())
        return
    print_line(
        f"merged {things(len(file.models), 'model')} by the rule {file.rule} into {out}: "
        f"{things(done.merged, 'tensor')}, {size(done.bytes)}"
    )


def _read_tree(text: str) -> Any:
    """Returns the text itself, or the contents of the file of that name."""
    path = Path(text)
    if path.suffix.lower() not in {".json", ".yaml", ".yml"}:
        return text
    from ...io.plain_yaml import read  # noqa: PLC0415 - keeps the listing of commands fast

    return read(path)


def print_plan(packs: list[Any], options: dict[str, Any], tree: str | None, as_json: bool) -> None:
    """Prints what compose would do."""
    if tree is not None:
        raise click.UsageError("A tree combines nothing before it runs, so there is no plan for it.")
    made = plan(packs, **options)
    if as_json:
        print_report({"plan": made.to_json()})
        return
    print_table(
        ["sites", "shape", "ranks", "path", "exact", "to rank", "flops", "holds"],
        [
            [
                f"{group.sites} such as {group.example}",
                " x ".join(map(str, group.shape)),
                " ".join(map(str, group.ranks)),
                group.path,
                group.exact,
                group.rank,
                f"{group.flops:.2g}",
                size(group.bytes),
            ]
            for group in made.groups
        ],
    )
    for text in dict.fromkeys(f"{group.path}: {group.why}" for group in made.groups):
        print_line(text)
    for text in dict.fromkeys(note for group in made.groups for note in group.notes):
        print_line(text)
    if made.whole["modules"]:
        print_line(f"modules trained whole ({', '.join(made.whole['modules'])}): {made.whole['policy']}")
    print_line(
        f"rule {made.rule}, class {made.needs}: {'exact' if made.exact else 'not exact'}, {made.flops:.2g} "
        f"operations on {made.threads} threads, at most {size(made.memory_bound)} of memory besides the packs"
    )


def print_left_out(params: Mapping[str, Any]) -> None:
    """Prints the sites that a budget left out, from the lineage's parameters."""
    if left_out := params.get("left_out"):
        print_line(
            f"left out {things(len(left_out), 'site')} for which the budget leaves no rank: "
            f"{', '.join(left_out[:5])}" + (" ..." if len(left_out) > 5 else "")
        )


def measure_packs(
    packs: list[Any],
    rule: str,
    data: tuple[str, ...],
    statistics: tuple[str, ...],
    base: str | None,
    out: str,
) -> tuple[str, ...]:
    """Measures the statistics of every pack on its own data, and saves them next to the output."""
    kind = RULES[rule].statistics
    if statistics or base is None or len(data) != len(packs) or not kind:
        raise ConfigError(
            "packs are measured on one data file each, for a rule that looks at data",
            where="--data",
            expected="--base, one file a pack, no --statistics, and the rule regmean or fisher",
            found=f"{len(data)} files, {len(packs)} packs, rule {rule}",
            remedy="see adapterpack measure --help",
        )
    files = tuple(f"{out}.{pack.name}.{kind}" for pack in packs)
    with show_steps() as step:
        for pack, source, file in zip(packs, data, files, strict=True):
            step(f"measure {pack.name} on {source}")
            adapterpack.measure(folder_of(base), pack, source, kind=kind, out=file)
    return files


def write_recipes(pack: Any, packs: tuple[str, ...], recipe: str | None, mergekit: str | None) -> None:
    """Writes the recipe of the pack, for adapterpack and for mergekit."""
    if recipe is None and mergekit is None:
        return
    stated = recipe_of(pack)
    if recipe is not None:
        stated.write(recipe)
    if mergekit is not None:
        by_digest = {load_pack(reference).id: reference.rpartition("=")[2] for reference in packs}
        write_mergekit(
            stated,
            pack.manifest.base.name or "BASE",
            [by_digest[parent.digest] for parent in stated.parents],
            mergekit,
        )
