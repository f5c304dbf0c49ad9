"""``adapterpack unmerge``."""

from __future__ import annotations

import click

import adapterpack

from ..hub.resolve import folder_of
from .options import out_option, pack_at, shared
from .output import emit, line


@click.command("unmerge")
@click.argument("merged", metavar="MERGED")
@out_option("The folder of the base")
@click.option(
    "--base",
    metavar="BASE",
    help="The base: it is copied, once it is proven to be the one that was merged into.",
)
@click.option(
    "--pack",
    "packs",
    multiple=True,
    metavar="PACK",
    help="Without --base: a pack that was merged; repeat it for each.",
)
@shared
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
        packs=[pack_at(pack) for pack in packs],
    )
    if as_json:
        emit({"command": "unmerge", **report.to_json()})
        return
    level = "every byte" if report.proof == "content" else "samples of every tensor"
    line(
        f"the base was {report.way} to {report.out}: its {report.tensors} tensors are those of the "
        f"merge, by {level}"
    )
