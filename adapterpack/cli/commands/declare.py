"""``adapterpack declare``."""

from __future__ import annotations

import click

import adapterpack

from ...hub import folder_of
from .. import common_options, divert_stdout, load_pack, out_option, print_line, print_report


@click.command("declare")
@click.argument("pack")
@click.argument("base")
@click.argument("other")
@out_option("The folder of the new pack")
@common_options
def command(pack: str, base: str, other: str, out: str, as_json: bool) -> None:
    """Compares OTHER with the base of a pack, and makes a copy of the pack that may be used on both.

    BASE is the checkpoint that the pack names. OTHER has the same weights in another dtype, in other files or
    under other names, which is checked byte by byte; or quantized, which can be recognized, and not checked.

    \b
    Example:
      adapterpack declare packs/tickets models/base models/base-bf16 -o packs/tickets-bf16
    """
    with divert_stdout():
        made = adapterpack.declare(load_pack(pack), folder_of(base), folder_of(other), out)
    summary = adapterpack.inspect(out)
    if as_json:
        print_report(summary)
        return
    variant = made.manifest.base.variants[-1]
    proof = "as its config or its names say" if variant.relation == "quantized" else "every byte compared"
    print_line(
        f"declared {other} as a variant of {summary['base']['name']} ({variant.relation}, {proof}) in {out}"
    )
