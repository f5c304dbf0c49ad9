"""Parts of ``adapterpack compose``: it prints plans, measures packs on data, and writes recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

import adapterpack

from ..composing.mergekit import write as write_mergekit
from ..composing.plan import plan
from ..composing.recipe import recipe_of
from ..composing.rules.rule import RULES
from ..errors import ConfigError
from ..hub.resolve import folder_of
from ..io.readable import size, things
from .logs import tell
from .options import pack_at
from .output import emit, line, table
from .progress import steps


def say(text: str) -> None:
    """One line to stderr."""
    tell(text)


def print_plan(packs: list[Any], options: dict[str, Any], tree: str | None, as_json: bool) -> None:
    """Prints what would be done."""
    if tree is not None:
        raise click.UsageError("A tree combines nothing before it runs, so there is no plan for it.")
    made = plan(packs, **options)
    if as_json:
        emit({"command": "compose", "plan": made.to_json()})
        return
    table(
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
        line(text)
    for text in dict.fromkeys(note for group in made.groups for note in group.notes):
        line(text)
    if made.whole["modules"]:
        line(f"modules trained whole ({', '.join(made.whole['modules'])}): {made.whole['policy']}")
    line(
        f"rule {made.rule}, class {made.needs}: {'exact' if made.exact else 'not exact'}, {made.flops:.2g} "
        f"operations on {made.threads} threads, at most {size(made.memory_bound)} of memory besides the packs"
    )


def print_left_out(params: Mapping[str, Any]) -> None:
    """Prints which sites a budget left out, by the parameters of a lineage."""
    if left_out := params.get("left_out"):
        line(
            f"left out {things(len(left_out), 'site')} for which the budget leaves no rank: "
            f"{', '.join(left_out[:5])}" + (" ..." if len(left_out) > 5 else "")
        )


def measure_each(
    packs: list[Any],
    rule: str,
    data: tuple[str, ...],
    statistics: tuple[str, ...],
    base: str | None,
    out: str,
) -> tuple[str, ...]:
    """The statistics of every pack on its own data, in files next to the output."""
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
    with steps() as step:
        for pack, source, file in zip(packs, data, files, strict=True):
            step(f"measure {pack.name} on {source}")
            adapterpack.measure(folder_of(base), pack, source, kind=kind, out=file)
    return files


def write_recipes(pack: Any, packs: tuple[str, ...], recipe: str | None, mergekit: str | None) -> None:
    """The files that say how the pack was made."""
    if recipe is None and mergekit is None:
        return
    described = recipe_of(pack)
    if recipe is not None:
        described.write(recipe)
    if mergekit is not None:
        by_digest = {pack_at(reference).id: reference.rpartition("=")[2] for reference in packs}
        write_mergekit(
            described,
            pack.manifest.base.name or "BASE",
            [by_digest[parent.digest] for parent in described.parents],
            mergekit,
        )
