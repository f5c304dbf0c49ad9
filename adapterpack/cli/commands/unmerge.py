"""``adapterpack unmerge``."""

from __future__ import annotations

import click

import adapterpack

from ...hub import folder_of
from .. import common_options, load_pack, option, out_option, print_line, print_report


@click.command("unmerge")
@click.argument("merged")
@out_option("The folder of the base")
@option("--base", "BASE", "The base: it is copied once it is proved to be the one that was merged into.")
@option("--pack packs", "PACK", "Without --base: a pack that was merged; repeat it for each.", multiple=True)
@common_options
def command(*, merged: str, out: str, base: str | None, packs: tuple[str, ...], as_json: bool) -> None:
    """Writes the base from which the checkpoint MERGED was made to OUT: exactly, or not at all.

    \b
    Example:
      adapterpack unmerge models/tickets --base models/base -o models/base-again
    """
    report = adapterpack.unmerge(
        folder_of(merged),
        out,
        base=None if base is None else folder_of(base),
        packs=[load_pack(pack) for pack in packs],
    )
    if as_json:
        print_report(report.to_json())
        return
    level = "every byte" if report.proof == "content" else "samples of every tensor"
    print_line(
        f"the base was {report.way} to {report.out}: its {report.tensors} tensors are those of the "
        f"merge, by {level}"
    )
