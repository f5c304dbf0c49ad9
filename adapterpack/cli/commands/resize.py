"""``adapterpack resize``."""

from __future__ import annotations

from typing import Any

import click

import adapterpack

from ...hub import folder_of
from ...pack import describe
from ...readable import show_value, size, things
from .. import common_options, load_pack, option, out_option, print_line, print_report
from .compose import print_left_out


@click.command("resize")
@click.argument("pack")
@out_option("The folder of the new pack")
@option("--rank", "R", "The largest rank that any site keeps.", type=int)
@option(
    "--energy", "Q", "The smallest rank that holds this share of the squared singular values.", type=float
)
@option(
    "--sv-ratio",
    "P",
    "Keep the singular values above the largest one divided by P, as kohya does.",
    type=float,
)
@option(
    "--sv-cumulative", "P", "The smallest rank that holds this share of the singular values' sum.", type=float
)
@option("--sv-fro", "P", "The smallest rank that holds this share of the Frobenius norm.", type=float)
@option(
    "--budget",
    "N",
    "How many numbers all factors may have together, distributed over sites for the "
    "least total error; below 1, a share of today's.",
    type=float,
)
@option("--base", "BASE", "The pack's base, for methods whose change depends on the weight (DoRA, OFT, ...).")
@common_options
def command(*, pack: str, out: str, base: str | None, as_json: bool, **cuts: Any) -> None:
    """Reduces a pack to a LoRA of smaller rank: at every site the best approximation of the change, by its
    exact singular values.

    \b
    Example:
      adapterpack resize packs/tickets --energy 0.99 -o packs/small
      adapterpack resize packs/tickets --budget 0.5 -o packs/half
    """
    loaded = load_pack(pack)
    before = sum(entry.size for entry in loaded.manifest.files)
    resized = adapterpack.resize(loaded, base=None if base is None else folder_of(base), out=out, **cuts)
    summary = describe(resized, out)
    if as_json:
        print_report({**summary, "bytes_before": before})
        return
    params = summary["lineage"]["params"]
    print_line(
        f"resized {pack} into {out}: {things(summary['sites'], 'site')} of rank "
        f"{', '.join(summary['ranks'])}, {size(before)} became {size(summary['bytes'])}"
    )
    errors = params["truncation"]["sites"]
    worst = max(errors, key=errors.get)
    print_line(
        f"relative error of the change: {show_value(params['truncation']['total'])} in total, "
        f"{show_value(errors[worst])} at most (at {worst})"
    )
    if "approximation" in params:
        print_line(
            f"{len(params['approximation']['sites'])} changes have no low rank; taking them as factors makes "
            f"a relative error of {show_value(params['approximation']['total'])}"
        )
    print_left_out(params)
