"""``adapterpack push``."""

from __future__ import annotations

from typing import Any

import click

import adapterpack

from ...hub.transport import parse_address
from .. import common_options, flag, option, print_line, print_report, show_bytes


@click.command("push")
@click.argument("pack", metavar="PACK|BUNDLE")
@click.argument("target", metavar="hf://ORG/NAME[/FOLDER]|oci://HOST/NAME[:TAG]")
@flag("--pr", "Open a pull request instead of committing to the branch.")
@option("--tag", "TAG", "Tag the commit; a tag never moves.")
@flag("--private", "Make the repository private, if it is new.")
@flag("--dry-run", "Make every check, say what would be sent, and send nothing.")
@option("--base-model", "ORG/NAME", "The base's repository, if the pack does not name it.")
@option("--license", "L", "The license, if the pack does not name it.")
@option("-m --message", "TEXT", "The commit's message.")
@common_options
def command(*, pack: str, target: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Checks a pack or a bundle, pushes it to a hub or a registry, and verifies what arrived.

    On a hub a push is one commit; equal content makes none. The token is that of "hf auth login", or
    HF_TOKEN; HF_ENDPOINT selects a hub other than the public one. With FOLDER the artifact goes into that
    folder of the repository, and everything else there stays.

    A registry of containers holds the artifact as the ModelPack specification has it, with its signature and
    a bill of materials attached. The login is that of docker or oras.

    \b
    Example:
      adapterpack push packs/tickets hf://org/tickets --license apache-2.0 --tag v1
      adapterpack push packs/tickets oci://registry.example.com/team/tickets:v1
    """
    with show_bytes("push") as progress:
        done = adapterpack.push(pack, target, dry_run=dry_run, progress=progress, **options)
    if as_json:
        print_report(done.to_json())
        return
    reference = parse_address(target)
    address = reference.address
    would = "would be " if dry_run else ""
    if not done.sent and not done.deleted:
        print_line(f"{address} holds this {done.kind} already: {done.id}")
    for what, names in (("sent", done.sent), ("deleted", done.deleted)):
        if names:
            print_line(f"{would}{what}: {', '.join(names)}")
    if done.pull_request:
        print_line(f"pull request: {done.pull_request}")
    if done.commit and not dry_run:
        print_line(f"{reference.at(done.commit)} holds {done.id}" + (f", tag {done.tag}" if done.tag else ""))
