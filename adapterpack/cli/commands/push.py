"""``adapterpack push``."""

from __future__ import annotations

from typing import Any

import click

import adapterpack

from ...hub.transport import HubReference
from ..options import common_options, flag, option
from ..output import print_json, print_line
from ..progress import show_bytes


@click.command("push")
@click.argument("pack", metavar="PACK|BUNDLE")
@click.argument("target", metavar="hf://ORG/NAME[/FOLDER]")
@flag("--pr", "Open a pull request instead of committing to the branch.")
@option("--tag", "TAG", "Tag the commit; a tag never moves.")
@flag("--private", "Make the repository private, if it is new.")
@flag("--dry-run", "Make every check, say what would be sent, and send nothing.")
@option("--base-model", "ORG/NAME", "The base's repository, if the pack does not name it.")
@option("--license", "L", "The license, if the pack does not name it.")
@option("-m --message", "TEXT", "The commit's message.")
@common_options
def command(*, pack: str, target: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Checks a pack or a bundle, pushes it to a repository on a hub as one commit, and verifies what arrived.

    The token is that of "hf auth login", or HF_TOKEN; HF_ENDPOINT selects a hub other than the public one.
    Equal content makes no commit. With FOLDER the artifact goes into that folder of the repository, and
    everything else there stays.

    \b
    Example:
      adapterpack push packs/tickets hf://org/tickets --license apache-2.0 --tag v1
    """
    with show_bytes("push") as progress:
        done = adapterpack.push(pack, target, dry_run=dry_run, progress=progress, **options)
    if as_json:
        print_json({"command": "push", **done.to_json()})
        return
    address = HubReference(done.repo, folder=done.folder).address
    would = "would be " if dry_run else ""
    if not done.sent and not done.deleted:
        print_line(f"{address} holds this {done.kind} already: {done.id}")
    for what, names in (("sent", done.sent), ("deleted", done.deleted)):
        if names:
            print_line(f"{would}{what}: {', '.join(names)}")
    if done.pull_request:
        print_line(f"pull request: {done.pull_request}")
    if done.commit and not dry_run:
        print_line(f"{address}@{done.commit} holds {done.id}" + (f", tag {done.tag}" if done.tag else ""))
