"""``adapterpack pull``."""

from __future__ import annotations

import click

import adapterpack

from ...hub.artifact import MAX_BYTES
from ...hub.transport import parse_address
from .. import common_options, flag, option, print_line, print_report, show_bytes


@click.command("pull")
@click.argument("source", metavar="hf://ORG/NAME[/FOLDER][@REV]|oci://HOST/NAME[:TAG|@DIGEST]")
@option("-o --output out", "OUT", "Also write it to this folder; it must not exist.")
@flag("--update", "Take the newest commit of the revision, not the pinned one, and say what changed.")
@option(
    "--lock",
    "FILE",
    "The lock file, with commit and digest of what was pulled.",
    default="adapterpack.lock",
    show_default=True,
)
@flag("--no-lock", "Neither read nor write a lock file.")
@option(
    "--max-bytes",
    "B",
    "Refuse anything larger, before downloading it [64 GiB].",
    type=click.IntRange(min=0),
    default=MAX_BYTES,
)
@common_options
def command(
    *,
    source: str,
    out: str | None,
    update: bool,
    lock: str,
    no_lock: bool,
    max_bytes: int,
    as_json: bool,
) -> None:
    """Pulls a pack or a bundle from a hub or a registry into the local store, and into a folder where one is
    named; only what is valid is kept.

    The lock file pins commit and digest: pulling again gives the same bytes, even if the branch or tag has
    moved. A PEFT adapter becomes a pack. FOLDER is a folder in the repository that holds an artifact. With
    HF_HUB_OFFLINE=1, what was pulled before is hashed again and used.

    \b
    Example:
      adapterpack pull hf://org/tickets@v1 -o packs/tickets
      adapterpack pull oci://registry.example.com/team/tickets:v1 -o packs/tickets
    """
    with show_bytes("pull") as progress:
        done = adapterpack.pull(
            source,
            out,
            update=update,
            lock=None if no_lock else lock,
            progress=progress,
            max_bytes=max_bytes,
        )
    if as_json:
        print_report(done.to_json())
        return
    reference = parse_address(source).at(done.commit)
    print_line(f"pulled the {done.kind} {done.id} of {reference} to {done.path}")
    for text in (*done.changed, *done.notes):
        print_line(text)
    if update and done.before is not None and not done.changed:
        print_line("nothing changed")
